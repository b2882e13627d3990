//! The write-cache switch (CONFIG_WCE) across a restart of this process. The front-end does not repeat it, and a guest
//! that turned its cache off counts on every completed write being durable (PROTOCOL 3).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What the file says when the cache is off; its absence says on.
const THROUGH: &str = "through\n";

/// Remembers one volume's switch in a file beside its socket. On a tmpfs it is gone after a reboot, as the virtual
/// machine is.
#[derive(Debug)]
pub struct WriteCache {
    path: PathBuf,
    /// What the file says, as far as known.
    on: Option<bool>,
}

impl WriteCache {
    /// Of the volume served on `socket`.
    pub fn of(socket: &Path) -> Self {
        let mut path = socket.as_os_str().to_owned();
        path.push(".wce");
        Self {
            path: path.into(),
            on: None,
        }
    }

    /// Whether the cache is on. What cannot be read is taken for off, the safe side.
    pub fn is_on(&self) -> bool {
        match self.path.try_exists() {
            Ok(off) => !off,
            Err(e) => {
                let path = self.path.display();
                log::warn!("{path} cannot be read ({e}): every write is made durable");
                false
            }
        }
    }

    /// The guest turned the cache on or off.
    pub fn set(&mut self, on: bool) {
        if self.on == Some(on) {
            return;
        }
        let done = if on { self.forget() } else { self.note() };
        match done {
            Ok(()) => self.on = Some(on),
            Err(e) => log::warn!(
                "the write-cache switch cannot be kept in {}: {e}; after a restart of this node the guest must set it again",
                self.path.display()
            ),
        }
    }

    fn note(&self) -> io::Result<()> {
        let fresh = self.path.with_extension("wce.new");
        fs::write(&fresh, THROUGH)?;
        fs::rename(&fresh, &self.path)
    }

    /// Back to the default: the volume is detached.
    ///
    /// # Errors
    ///
    /// The file is there and cannot be removed.
    pub fn forget(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_was_turned_off_is_off_for_the_next_process_until_it_is_turned_on_or_forgotten()
    {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vm1.sock");
        assert!(WriteCache::of(&socket).is_on());
        WriteCache::of(&socket).set(false);
        assert!(!WriteCache::of(&socket).is_on());
        WriteCache::of(&socket).set(true);
        assert!(WriteCache::of(&socket).is_on());
        WriteCache::of(&socket).set(false);
        WriteCache::of(&socket).forget().unwrap();
        assert!(WriteCache::of(&socket).is_on());
    }
}
