//! The files of one copy: made whole or not at all, locked while open, removed by renaming first.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::layout::{data_len, meta_len};
use super::os;
use super::{FormatError, Loaded, Metadata, ReadAt};
use crate::replication::copy_state::CopyState;

/// The volume's bytes.
pub(super) const DATA: &str = "data";
/// What is to be known about them.
pub(super) const META: &str = "meta";
/// A directory in the making, or being removed, begins with a dot: never taken for a copy, swept at the node's start.
const MAKING: &str = ".new-";
const REMOVING: &str = ".gone-";
/// One that was taken out of use and is kept: neither taken for a copy nor swept.
const ASIDE: &str = "aside-";
/// Copies of one volume that may lie aside: each is somebody's decision to be made.
const ASIDE_MAX: u32 = 1000;
/// Bytes left free beside what a copy needs: its directory, and the file system's own blocks.
const SLACK: u64 = 64 << 10;

/// One copy's open files. The lock of the copy is `data`'s: it is held until `data` is closed *and* the last request on it has
/// ended (PROTOCOL 5). Neither file may be handed to another process.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// The volume's bytes, each at its own offset. The only descriptor for them: buffered and direct I/O do not mix.
    pub data: File,
    /// Superblocks, log and bitmaps; buffered.
    pub meta: File,
    /// `data` bypasses the page cache. Then offset and length of each request are multiples of 512 (the guest's always are)
    /// and its memory is aligned to `memory_align`. If not `direct`, requests of any shape are taken.
    pub direct: bool,
    /// What memory given to `data` must be aligned to, in bytes: 1 when not `direct`. A buffer aligned to 4096 always is.
    pub memory_align: u32,
    /// The files lie in memory (tmpfs, ramfs): nothing outlives a power cut.
    pub memory: bool,
}

/// What can go wrong with a copy's files.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another open `Store` has the lock.
    #[error("{dir} is in use: another process serves this copy, or its last request has not ended")]
    InUse {
        /// Which.
        dir: PathBuf,
    },
    /// There is a copy already.
    #[error("{dir} exists: this node has a copy of the volume already")]
    Exists {
        /// Which.
        dir: PathBuf,
    },
    /// There is no copy.
    #[error("no copy in {dir} (was the disk replaced or wiped?)")]
    Missing {
        /// Which.
        dir: PathBuf,
    },
    /// The disk, or a quota, is full.
    #[error("not enough space for {dir}: {needed} bytes needed, {free} free")]
    NoSpace {
        /// Which.
        dir: PathBuf,
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that the file system has left.
        free: u64,
    },
    /// A file is shorter than its superblock says.
    #[error("{file} was truncated: {found} bytes instead of {expected}")]
    Truncated {
        /// Which.
        file: PathBuf,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// The metadata cannot be used.
    #[error("{dir}: {source}")]
    Format {
        /// Whose.
        dir: PathBuf,
        /// Why.
        source: FormatError,
    },
    /// The system refused something else.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Names what was tried, on what.
pub(super) fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io {
        what,
        path: path.into(),
        source,
    }
}

/// A full disk's error, or the one that [`at`] makes.
pub(super) fn space(
    what: &'static str,
    path: &Path,
    dir: &Path,
    needed: u64,
) -> impl FnOnce(io::Error) -> StoreError {
    move |source| {
        if os::is_full(&source) {
            let free = dir
                .parent()
                .and_then(|p| os::free_bytes(p).ok())
                .unwrap_or(0);
            return StoreError::NoSpace {
                dir: dir.into(),
                needed,
                free,
            };
        }
        at(what, path)(source)
    }
}

impl ReadAt for File {
    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut got = 0;
        while got < len {
            match self.read_at(&mut bytes[got..], offset + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        bytes.truncate(got);
        Ok(bytes)
    }
}

impl Store {
    /// Makes a copy in `dir`, whose parent exists, and opens it. All of it is durable when this returns, and nothing of it
    /// remains after an error or a crash but a directory that the node's next start removes. `preallocate` takes the whole
    /// volume's space now; otherwise `data` is sparse.
    ///
    /// Errors: `Exists`, `NoSpace`, `Io`.
    pub fn create(
        dir: &Path,
        state: &CopyState,
        preallocate: bool,
    ) -> Result<(Store, Loaded), StoreError> {
        if dir.symlink_metadata().is_ok() {
            return Err(StoreError::Exists { dir: dir.into() });
        }
        let (parent, making) = siblings(dir, MAKING)?;
        let needed =
            meta_len(state.size) + if preallocate { data_len(state.size) } else { 0 } + SLACK;
        let free = os::free_bytes(parent).map_err(at("read the free space of", parent))?;
        if free < needed {
            return Err(StoreError::NoSpace {
                dir: dir.into(),
                needed,
                free,
            });
        }
        remove_all(&making)?;
        let made = fill(&making, dir, state, preallocate, needed).and_then(|()| {
            // Onto an existing copy this fails: a directory that is not empty is never replaced.
            fs::rename(&making, dir).map_err(at("rename to its place", &making))?;
            os::sync_dir(parent).map_err(at("sync", parent))
        });
        if let Err(e) = made {
            // What was made is swept at the next start if it cannot be removed now; the first error is the one to tell.
            let _ = fs::remove_dir_all(&making);
            return Err(e);
        }
        Self::open(dir)
    }

    /// Opens and locks the copy in `dir`.
    ///
    /// Errors: `Missing`, `InUse`, `Truncated`, `Format`, `Io`.
    pub fn open(dir: &Path) -> Result<(Store, Loaded), StoreError> {
        let (data_path, meta_path) = (dir.join(DATA), dir.join(META));
        if !dir.is_dir() {
            return Err(StoreError::Missing { dir: dir.into() });
        }
        let open = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(at("open", path))
        };
        let buffered = open(&data_path)?;
        let memory = os::in_memory(&buffered).map_err(at("read the file system of", &data_path))?;
        let direct = if memory {
            None
        } else {
            os::open_direct(&data_path)
        };
        let (data, memory_align, direct) = match direct {
            Some((file, align)) => (file, align, true),
            None => (buffered, 1, false),
        };
        // Before anything is read: the lock is on the descriptor that carries the requests.
        if !os::lock(&data).map_err(at("lock", &data_path))? {
            return Err(StoreError::InUse { dir: dir.into() });
        }
        let meta = open(&meta_path)?;
        // What a dead process left in the page cache reads back but may not be on the disk; all that follows builds on it.
        meta.sync_all().map_err(at("sync", &meta_path))?;
        let loaded = Metadata::load(&meta).map_err(|source| StoreError::Format {
            dir: dir.into(),
            source,
        })?;
        long_enough(&data, &data_path, data_len(loaded.state.size))?;
        long_enough(&meta, &meta_path, meta_len(loaded.state.size))?;
        Ok((
            Store {
                dir: dir.into(),
                data,
                meta,
                direct,
                memory_align,
                memory,
            },
            loaded,
        ))
    }

    /// Removes the copy in `dir` for good. Its `Store` must have been dropped, and its requests ended.
    ///
    /// Errors: `Missing`, `InUse`, `Io`. Once it is renamed the copy is gone even if deleting its files fails.
    pub fn remove(dir: &Path) -> Result<(), StoreError> {
        let _lock = lock_closed(dir)?;
        let (parent, aside) = siblings(dir, REMOVING)?;
        remove_all(&aside)?;
        fs::rename(dir, &aside).map_err(at("rename", dir))?;
        os::sync_dir(parent).map_err(at("sync", parent))?;
        remove_all(&aside)
    }

    /// Renames the copy in `dir` so that it is no copy any more, and says where it lies. Its `Store` must have been
    /// dropped, and its requests ended.
    ///
    /// Errors: `Missing`, `InUse`, `Io`.
    pub fn set_aside(dir: &Path) -> Result<PathBuf, StoreError> {
        let _lock = lock_closed(dir)?;
        for number in 1..=ASIDE_MAX {
            let (parent, aside) = siblings(dir, &format!("{ASIDE}{number}-"))?;
            if aside.symlink_metadata().is_ok() {
                continue;
            }
            fs::rename(dir, &aside).map_err(at("rename", dir))?;
            os::sync_dir(parent).map_err(at("sync", parent))?;
            return Ok(aside);
        }
        Err(at("set aside", dir)(io::ErrorKind::AlreadyExists.into()))
    }

    /// Bytes that `data` has now: fewer than before only when somebody cut it short.
    pub fn data_bytes(&self) -> io::Result<u64> {
        self.data.metadata().map(|m| m.len())
    }

    /// Bytes that `data` takes on its disk.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        // st_blocks counts in 512 bytes whatever the file system's block is (stat(2)).
        Ok(self.data.metadata()?.blocks() * 512)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The lock of a copy that nobody has open, held until it is dropped. Damaged copies are locked too: one without `data`
/// has nobody to lock it.
fn lock_closed(dir: &Path) -> Result<Option<File>, StoreError> {
    if !dir.is_dir() {
        return Err(StoreError::Missing { dir: dir.into() });
    }
    let data_path = dir.join(DATA);
    let file = match File::open(&data_path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(at("open", &data_path)(e)),
    };
    if !os::lock(&file).map_err(at("lock", &data_path))? {
        return Err(StoreError::InUse { dir: dir.into() });
    }
    Ok(Some(file))
}

/// Removes what creations and removals left unfinished in `volumes`. Nobody may be creating or removing there meanwhile: the
/// node's lock sees to it.
pub(super) fn sweep(volumes: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(volumes).map_err(at("list", volumes))? {
        let entry = entry.map_err(at("list", volumes))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(MAKING) || name.starts_with(REMOVING) {
            remove_all(&entry.path())?;
        }
    }
    Ok(())
}

/// The directory of `dir`, and the name beside it that `prefix` makes.
fn siblings<'a>(dir: &'a Path, prefix: &str) -> Result<(&'a Path, PathBuf), StoreError> {
    match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) => Ok((
            parent,
            parent.join(format!("{prefix}{}", name.to_string_lossy())),
        )),
        _ => Err(at("use as a copy's directory", dir)(
            io::ErrorKind::InvalidInput.into(),
        )),
    }
}

fn remove_all(dir: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// Makes everything in `making`, durably. `dir` and `needed` are for the error that tells of a full disk.
fn fill(
    making: &Path,
    dir: &Path,
    state: &CopyState,
    preallocate: bool,
    needed: u64,
) -> Result<(), StoreError> {
    fs::create_dir(making).map_err(space("create", making, dir, needed))?;
    let create = |name: &str| {
        let path = making.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        file.map_err(space("create", &path, dir, needed))
            .map(|file| (file, path))
    };
    let (meta, path) = create(META)?;
    os::reserve(&meta, 0, meta_len(state.size)).map_err(space(
        "preallocate",
        &path,
        dir,
        needed,
    ))?;
    for write in Metadata::format(state).1 {
        meta.write_all_at(&write.bytes, write.offset)
            .map_err(space("write", &path, dir, needed))?;
    }
    meta.sync_all().map_err(space("sync", &path, dir, needed))?;
    let (data, path) = create(DATA)?;
    lengthen(&data, 0, data_len(state.size), preallocate).map_err(space(
        "preallocate",
        &path,
        dir,
        needed,
    ))?;
    data.sync_all().map_err(space("sync", &path, dir, needed))?;
    os::sync_dir(making).map_err(space("sync", making, dir, needed))
}

pub(super) fn lengthen(data: &File, old: u64, new: u64, preallocate: bool) -> io::Result<()> {
    if preallocate {
        os::reserve(data, old, new)
    } else {
        data.set_len(new)
    }
}

fn long_enough(file: &File, path: &Path, expected: u64) -> Result<(), StoreError> {
    let found = file
        .metadata()
        .map_err(at("read the length of", path))?
        .len();
    if found < expected {
        return Err(StoreError::Truncated {
            file: path.into(),
            expected,
            found,
        });
    }
    Ok(())
}
