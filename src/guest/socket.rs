//! Claiming the path that front-ends connect to.
//!
//! A path may be left over from a process that died, or belong to one that lives. Which of the two is asked by
//! connecting: only a socket that somebody listens on accepts. Two processes that find the same leftover at the same
//! moment are kept apart by a lock on the directory, held only while the path is claimed.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::config::ConfigError;

/// Owner and group may connect, as for the management socket.
const SOCKET_MODE: u32 = 0o660;
/// Attempts at the directory's lock, and the pause between them. It is held for less than one pause.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why a volume cannot be served on a socket.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The device's description is not acceptable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another process listens there.
    #[error(
        "socket {} is in use by a running process; detach the volume there or stop that process, or choose another path with --socket",
        .0.display()
    )]
    SocketInUse(PathBuf),
    /// Something that is not a socket is in the way.
    #[error("{} exists and is not a socket; remove it, or choose another path with --socket", .0.display())]
    NotASocket(PathBuf),
    /// Anything else, with what was being done.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb phrase.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl ServeError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ServeError {
        let path = path.to_owned();
        move |source| ServeError::Io {
            action,
            path,
            source,
        }
    }
}

/// A path that this process listens on. Removed by [`release`](Claim::release) and when dropped, unless somebody
/// replaced it.
#[derive(Debug)]
pub(super) struct Claim {
    path: PathBuf,
    /// The socket's inode, opened as a mere path. While it is open its number is not given to another file, so that
    /// a successor's socket at the same path is told from ours.
    inode: File,
}

impl Claim {
    /// Binds the path: creates its directories, removes what a dead process left, refuses what a live one owns.
    pub(super) fn bind(path: &Path) -> Result<(UnixListener, Claim), ServeError> {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        fs::create_dir_all(dir).map_err(ServeError::io("create directory", dir))?;
        let _lock = lock_dir(dir).map_err(ServeError::io("lock directory", dir))?;
        remove_leftover(path)?;
        let listener = UnixListener::bind(path).map_err(ServeError::io("bind socket", path))?;
        // Until this line the mode is the process's umask: a service's umask does not let others write, and nobody
        // is served before the listener is accepted from.
        fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))
            .map_err(ServeError::io("set the mode of socket", path))?;
        let inode = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(path)
            .map_err(ServeError::io("inspect socket", path))?;
        let claim = Claim {
            path: path.to_owned(),
            inode,
        };
        Ok((listener, claim))
    }

    /// Takes over what the process before bound: its socket is at `path` still, or the path is somebody else's by now.
    pub(super) fn adopt(path: &Path, inode: OwnedFd) -> Claim {
        Claim {
            path: path.to_owned(),
            inode: inode.into(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The socket's inode once more.
    pub(super) fn inode(&self) -> io::Result<OwnedFd> {
        self.inode.as_fd().try_clone_to_owned()
    }

    /// Removes the path if it is still the socket that was bound.
    pub(super) fn release(&self) {
        let (Ok(ours), Ok(now)) = (self.inode.metadata(), fs::symlink_metadata(&self.path)) else {
            return;
        };
        if (ours.dev(), ours.ino()) == (now.dev(), now.ino())
            && let Err(e) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove socket {}: {e}", self.path.display());
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.release();
    }
}

fn remove_leftover(path: &Path) -> Result<(), ServeError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(ServeError::io("inspect socket", path)(e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ServeError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    // Not blocking: a listener whose backlog is full would make a blocking connect wait, and is as alive as any.
    match mio::net::UnixStream::connect(path) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {}
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == ErrorKind::WouldBlock => {
            return Err(ServeError::SocketInUse(path.to_owned()));
        }
        Err(e) => return Err(ServeError::io("probe socket", path)(e)),
        Ok(_) => return Err(ServeError::SocketInUse(path.to_owned())),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(ServeError::io("remove stale socket", path)(e))
        }
        _ => {
            log::info!("removed stale socket {}", path.display());
            Ok(())
        }
    }
}

/// An advisory lock on a directory, given up when the file is closed.
fn lock_dir(dir: &Path) -> io::Result<File> {
    let file = File::open(dir)?;
    for _ in 0..LOCK_ATTEMPTS {
        // SAFETY: flock takes no pointers, and the descriptor is open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(file);
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::WouldBlock {
            return Err(error);
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Err(io::Error::other("another process holds its lock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/v.sock");
        let (listener, claim) = Claim::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, SOCKET_MODE);
        let refused = Claim::bind(&path).unwrap_err();
        assert!(matches!(&refused, ServeError::SocketInUse(_)));
        assert!(refused.to_string().contains("--socket"));

        drop(listener);
        assert!(path.exists(), "as a killed process leaves it");
        let (_listener, successor) = Claim::bind(&path).unwrap();
        claim.release();
        assert!(
            path.exists(),
            "the successor's socket is not ours to remove"
        );
        successor.release();
        assert!(!path.exists());
    }

    #[test]
    fn a_listener_with_a_full_backlog_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let (_listener, _claim) = Claim::bind(&path).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = mio::net::UnixStream::connect(&path) {
            waiting.push(stream);
        }
        assert!(matches!(
            Claim::bind(&path),
            Err(ServeError::SocketInUse(_))
        ));
    }

    #[test]
    fn other_files_are_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Claim::bind(&path), Err(ServeError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let below_a_file = path.join("v.sock");
        assert!(matches!(
            Claim::bind(&below_a_file),
            Err(ServeError::Io { .. })
        ));
        let too_long = dir.path().join("x".repeat(120));
        assert!(matches!(Claim::bind(&too_long), Err(ServeError::Io { .. })));
    }
}
