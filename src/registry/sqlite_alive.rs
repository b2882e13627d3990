//! An announcement beside an SQLite registry: a file that its process holds a lock on. The kernel lets go of it when the
//! process is no more, so it needs no time to live, and nothing is written while the process lives.
//!
//! Each announcement is a file of its own, `<registry>-alive/<name>.<random>`, locked before it gets that name. So nobody
//! ever waits for a lock, and a file that can be locked is a dead process's, for ever.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Presence, Present};

/// Ends the name of the directory beside the registry.
const DIRECTORY: &str = "-alive";

fn directory(registry: &Path) -> PathBuf {
    let mut directory = registry.as_os_str().to_owned();
    directory.push(DIRECTORY);
    directory.into()
}

/// The name that a file announces. None of ours begins with a dot, as files do until they are locked.
fn announced(file: &OsStr) -> Option<&str> {
    let (name, _random) = file.to_str()?.rsplit_once('.')?;
    (!name.is_empty() && !name.starts_with('.')).then_some(name)
}

/// Whether the process that made the file is no more.
fn is_dead(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        // Withdrawn meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(e) => return Err(e),
    };
    // Shared: two who look at the same time do not take each other for it. Given back with the descriptor.
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn files(directory: &Path) -> io::Result<Vec<OsString>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Announces `name`, a name without `/`, beside the registry at this path.
pub(super) fn announce(registry: &Path, name: &str) -> io::Result<Presence> {
    let directory = directory(registry);
    fs::create_dir_all(&directory)?;
    for file in files(&directory)? {
        let path = directory.join(&file);
        if announced(&file) == Some(name) && is_dead(&path)? {
            let _ = fs::remove_file(&path);
        }
    }
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
    let unique = format!("{name}.{:016x}", u64::from_le_bytes(random));
    let (fresh, path) = (
        directory.join(format!(".{unique}")),
        directory.join(&unique),
    );
    let file = File::options().write(true).create_new(true).open(&fresh)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    fs::rename(&fresh, &path)?;
    Ok(Presence::new(move || {
        let _ = fs::remove_file(&path);
        drop(file);
    }))
}

/// Who is announced beside the registry at this path.
pub(super) fn present(registry: &Path) -> io::Result<Present> {
    let directory = directory(registry);
    let mut present = Present {
        certain: true,
        ..Present::default()
    };
    for file in files(&directory)? {
        if let Some(name) = announced(&file)
            && !is_dead(&directory.join(&file))?
        {
            present.names.insert(name.into());
        }
    }
    Ok(present)
}
