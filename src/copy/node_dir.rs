//! A node's data directory.
use std::io;
use std::path::{Path, PathBuf};

use crate::replication::ids::{ClusterId, NodeName, VolumeId};

/// A node's data directory, locked.
#[derive(Debug)]
pub struct NodeDir {}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeDirError {
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
impl NodeDir {
    /// Locks `data_dir`, creating it when absent, and checks that it is this node's.
    pub fn open(
        data_dir: &Path,
        node: &NodeName,
        cluster: Option<ClusterId>,
    ) -> Result<NodeDir, NodeDirError> {
        todo!()
    }
    /// The cluster joined.
    pub fn cluster(&self) -> Option<ClusterId> {
        todo!()
    }
    /// Joins, durably; an error when another was joined before.
    pub fn join(&mut self, cluster: ClusterId) -> Result<(), NodeDirError> {
        todo!()
    }
    /// Where the copy of `volume` is or would be.
    pub fn volume_dir(&self, volume: VolumeId) -> PathBuf {
        todo!()
    }
    /// The volumes with a copy here, ascending.
    pub fn volumes(&self) -> Result<Vec<VolumeId>, NodeDirError> {
        todo!()
    }
}
