//! The files of one copy.
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::{FormatError, Loaded};
use crate::replication::copy_state::CopyState;

/// One copy's open, locked files.
#[derive(Debug)]
pub struct Store {
    /// The volume's bytes at the same offset. One descriptor for all I/O.
    pub data: File,
    /// Superblock, log and bitmaps; buffered.
    pub meta: File,
    /// `data` bypasses the page cache. Then offset and length of each request must be multiples of 512 (every guest
    /// request is), memory of `memory_align`.
    pub direct: bool,
    /// `data` lies in memory (tmpfs, ramfs): nothing outlives a power cut.
    pub memory: bool,
    /// Alignment of the memory given to `data`, in bytes; 1 when not `direct`.
    pub memory_align: u32,
}

/// What can go wrong with a copy's files.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The lock is taken.
    #[error("{dir} is in use by another process")]
    InUse {
        /// Which.
        dir: PathBuf,
    },
    /// There is one already.
    #[error("{dir} exists already")]
    Exists {
        /// Which.
        dir: PathBuf,
    },
    /// No such copy.
    #[error("no copy at {dir}")]
    Missing {
        /// Which.
        dir: PathBuf,
    },
    /// The disk is full.
    #[error("no space for {dir}: {needed} bytes needed, {free} free")]
    NoSpace {
        /// Which.
        dir: PathBuf,
        /// Bytes that this needs.
        needed: u64,
        /// Bytes that the file system has left.
        free: u64,
    },
    /// A file is shorter than its superblock says.
    #[error(
        "{file} has {found} bytes instead of {expected}: it was truncated; remove this copy and let it be synced anew"
    )]
    Truncated {
        /// Which.
        file: PathBuf,
        /// Length it must have.
        expected: u64,
        /// Length it has.
        found: u64,
    },
    /// The metadata cannot be used.
    #[error("{dir}: {source}")]
    Format {
        /// Which.
        dir: PathBuf,
        /// Why.
        source: FormatError,
    },
    /// The system refused.
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

#[allow(unused_variables)]
impl Store {
    /// Makes the copy's directory with everything in it durable, or nothing, and opens it.
    pub fn create(
        dir: &Path,
        state: &CopyState,
        preallocate: bool,
    ) -> Result<(Store, Loaded), StoreError> {
        todo!()
    }
    /// Locks and opens.
    pub fn open(dir: &Path) -> Result<(Store, Loaded), StoreError> {
        todo!()
    }
    /// Removes the copy for good; the caller has dropped its `Store`.
    pub fn remove(dir: &Path) -> Result<(), StoreError> {
        todo!()
    }
    /// Bytes that `data` takes on disk.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        todo!()
    }
    /// Makes room for a volume of `size` bytes, durably; before the superblock that says so.
    pub fn grow(&self, size: u64, preallocate: bool) -> Result<(), StoreError> {
        todo!()
    }
}
