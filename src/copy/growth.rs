//! A copy's files made longer, on a thread of its own: taking space and flushing may last, and nothing depends on it but the
//! superblock that is written afterwards. Files never shrink, so nothing that was ever written can be in the new tail.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::layout::{data_len, meta_len};
use super::os;
use super::store::{DATA, META, Store, StoreError, at, lengthen, space};

/// Files about to be made longer. They are the same open files as the copy's: the lock of the copy is held until this is
/// dropped, too.
#[derive(Debug)]
pub struct Growth {
    dir: PathBuf,
    data: File,
    meta: File,
    size: u64,
    preallocate: bool,
}

/// Why a copy has not grown.
#[derive(Debug, thiserror::Error)]
pub enum GrowthError {
    /// The files keep what they had room for, and may be longer: nothing is lost.
    #[error(transparent)]
    NoRoom(StoreError),
    /// A flush failed: nobody knows what is on the disk, and the copy is not to be used any more (PROTOCOL 3).
    #[error(transparent)]
    Failed(StoreError),
}

impl Store {
    /// Prepares to make room for a volume of `size` bytes; `preallocate` takes the space for the data, too.
    ///
    /// Errors: `Io`, and nothing has changed.
    pub fn growth(&self, size: u64, preallocate: bool) -> Result<Growth, StoreError> {
        let duplicate = |file: &File, name| {
            file.try_clone()
                .map_err(at("duplicate the descriptor of", &self.dir().join(name)))
        };
        Ok(Growth {
            dir: self.dir().into(),
            data: duplicate(&self.data, DATA)?,
            meta: duplicate(&self.meta, META)?,
            size,
            preallocate,
        })
    }
}

impl Growth {
    /// Makes the files long enough, durably. The superblock that says so is written afterwards. Never shrinks.
    ///
    /// Errors: see [`GrowthError`].
    pub fn run(self) -> Result<(), GrowthError> {
        let (data_path, meta_path) = (self.dir.join(DATA), self.dir.join(META));
        self.lengthen(&data_path, &meta_path)
            .map_err(GrowthError::NoRoom)?;
        let sync = |file: &File, path| file.sync_all().map_err(at("sync", path));
        sync(&self.meta, &meta_path)
            .and_then(|()| sync(&self.data, &data_path))
            .map_err(GrowthError::Failed)
    }

    fn lengthen(&self, data_path: &Path, meta_path: &Path) -> Result<(), StoreError> {
        let length = |file: &File, path: &Path| -> Result<u64, StoreError> {
            let found: io::Result<_> = file.metadata();
            Ok(found.map_err(at("read the length of", path))?.len())
        };
        let (old_meta, old_data) = (
            length(&self.meta, meta_path)?,
            length(&self.data, data_path)?,
        );
        let (meta, data) = (
            meta_len(self.size).max(old_meta),
            data_len(self.size).max(old_data),
        );
        let for_data = if self.preallocate { data - old_data } else { 0 };
        let needed = meta - old_meta + for_data;
        os::reserve(&self.meta, old_meta, meta)
            .map_err(space("grow", meta_path, &self.dir, needed))?;
        lengthen(&self.data, old_data, data, self.preallocate)
            .map_err(space("grow", data_path, &self.dir, needed))
    }
}
