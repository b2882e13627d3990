//! A node's data directory: whose it is, that only one process has it, and which volumes have a copy in it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::store::{META, StoreError, sweep};
use super::{FormatError, os, superblock};
use crate::replication::ids::{ClusterId, NodeName, VolumeId};

/// The format of `node.json` that this program writes, and the newest it reads.
const FORMAT: u32 = 1;
const IDENTITY: &str = "node.json";
const LOCK: &str = "node.lock";
const VOLUMES: &str = "volumes";

/// A node's data directory, locked for as long as this lives.
#[derive(Debug)]
pub struct NodeDir {
    dir: PathBuf,
    identity: Identity,
    /// Held for its lock alone.
    _lock: File,
}

/// The content of `node.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Identity {
    format: u32,
    node: NodeName,
    cluster: Option<ClusterId>,
    /// Seconds since 1970.
    created: u64,
}

/// Just enough of `node.json` to tell its format.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeDirError {
    /// A live process has it.
    #[error(
        "{dir} is in use by another lockstep node process: stop that one, or give this node a --data-dir of its own"
    )]
    InUse {
        /// Which.
        dir: PathBuf,
    },
    /// It is another node's.
    #[error(
        "{dir} belongs to node '{owner}', not '{node}': start with --name {owner}, or with another --data-dir"
    )]
    OtherNode {
        /// Which.
        dir: PathBuf,
        /// Whose.
        owner: NodeName,
        /// Who asked.
        node: NodeName,
    },
    /// It is another cluster's.
    #[error(
        "{dir} belongs to cluster {owner}, but the registry is of cluster {cluster}: check --registry, or use another --data-dir"
    )]
    OtherCluster {
        /// Which.
        dir: PathBuf,
        /// Whose.
        owner: ClusterId,
        /// Which one asked.
        cluster: ClusterId,
    },
    /// A newer program's.
    #[error(
        "{file} has format {found}, but this program reads {FORMAT} at most: run the lockstep that wrote it, or a newer one"
    )]
    Newer {
        /// Which.
        file: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Not what this program writes.
    #[error(
        "{file} is damaged ({source}): restore it; the copies beside it belong to the node it named"
    )]
    Damaged {
        /// Which.
        file: PathBuf,
        /// How.
        source: serde_json::Error,
    },
    /// Copies without an owner.
    #[error(
        "{file} is missing, but there are copies beside it: restore it, or use another --data-dir"
    )]
    NoIdentity {
        /// Which.
        file: PathBuf,
    },
    /// What a crash left of a copy could not be removed, or a copy is of a newer program.
    #[error(transparent)]
    Copy(#[from] StoreError),
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
fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NodeDirError {
    move |source| NodeDirError::Io {
        what,
        path: path.into(),
        source,
    }
}

impl NodeDir {
    /// Locks `dir`, checks that it is `node`'s, and removes what a crash left unfinished in it. Makes directory and identity when
    /// absent. With `cluster`, also [joins](Self::join) it.
    ///
    /// Errors: see [`NodeDirError`].
    pub fn open(
        dir: &Path,
        node: &NodeName,
        cluster: Option<ClusterId>,
    ) -> Result<NodeDir, NodeDirError> {
        let volumes = dir.join(VOLUMES);
        fs::create_dir_all(&volumes).map_err(at("create", &volumes))?;
        let lock_path = dir.join(LOCK);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path);
        let lock = lock.map_err(at("open", &lock_path))?;
        if !os::lock(&lock).map_err(at("lock", &lock_path))? {
            return Err(NodeDirError::InUse { dir: dir.into() });
        }
        let identity = match read_identity(&dir.join(IDENTITY))? {
            Some(identity) if identity.node != *node => {
                return Err(NodeDirError::OtherNode {
                    dir: dir.into(),
                    owner: identity.node,
                    node: node.clone(),
                });
            }
            Some(identity) => identity,
            None => new_identity(dir, node)?,
        };
        let mut this = Self {
            dir: dir.into(),
            identity,
            _lock: lock,
        };
        if let Some(cluster) = cluster {
            this.join(cluster)?;
        }
        sweep(&volumes)?;
        Ok(this)
    }

    /// Whether this program could use `dir` as `node`'s, as far as formats tell. Locks nothing and changes nothing, so that it can
    /// be asked while another process has it.
    ///
    /// Errors: see [`NodeDirError`].
    pub fn is_readable(dir: &Path, node: &NodeName) -> Result<(), NodeDirError> {
        match read_identity(&dir.join(IDENTITY))? {
            Some(identity) if identity.node != *node => {
                return Err(NodeDirError::OtherNode {
                    dir: dir.into(),
                    owner: identity.node,
                    node: node.clone(),
                });
            }
            Some(_) => {}
            None => return Ok(()),
        }
        let volumes = dir.join(VOLUMES);
        for volume in volumes_in(&volumes)? {
            let dir = volumes.join(volume.to_string());
            // What else is wrong with a copy is wrong today as well.
            let Ok(meta) = File::open(dir.join(META)) else {
                continue;
            };
            if let Err(source @ FormatError::Newer { .. }) = superblock::load(&meta) {
                return Err(StoreError::Format { dir, source }.into());
            }
        }
        Ok(())
    }

    /// The cluster this node joined, if any.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.identity.cluster
    }

    /// When the directory was made, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.identity.created
    }

    /// Remembers, durably, that this node is of `cluster`.
    ///
    /// Errors: `OtherCluster` when it is of another one already, `Io`.
    pub fn join(&mut self, cluster: ClusterId) -> Result<(), NodeDirError> {
        match self.identity.cluster {
            Some(owner) if owner != cluster => Err(NodeDirError::OtherCluster {
                dir: self.dir.clone(),
                owner,
                cluster,
            }),
            Some(_) => Ok(()),
            None => {
                let identity = Identity {
                    cluster: Some(cluster),
                    ..self.identity.clone()
                };
                write_identity(&self.dir, &identity)?;
                self.identity = identity;
                Ok(())
            }
        }
    }

    /// Where the copy of `volume` is, or would be.
    pub fn volume_dir(&self, volume: VolumeId) -> PathBuf {
        self.dir.join(VOLUMES).join(volume.to_string())
    }

    /// The volumes with a copy here, ascending. Names that are no volume's id are passed over.
    pub fn volumes(&self) -> Result<Vec<VolumeId>, NodeDirError> {
        volumes_in(&self.dir.join(VOLUMES))
    }
}

fn volumes_in(dir: &Path) -> Result<Vec<VolumeId>, NodeDirError> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).map_err(at("list", dir))? {
        let name = entry.map_err(at("list", dir))?.file_name();
        // Only the spelling that `volume_dir` makes: another one would not be found again.
        out.extend(
            name.to_str()
                .and_then(|n| n.parse::<VolumeId>().ok().filter(|id| id.to_string() == n)),
        );
    }
    out.sort_unstable();
    Ok(out)
}

fn read_identity(file: &Path) -> Result<Option<Identity>, NodeDirError> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(at("read", file)(e)),
    };
    let damaged = |source| NodeDirError::Damaged {
        file: file.into(),
        source,
    };
    // Format first: the other fields of a newer one may be anything.
    let AnyFormat { format } = serde_json::from_slice(&text).map_err(damaged)?;
    if format > FORMAT {
        return Err(NodeDirError::Newer {
            file: file.into(),
            found: format,
        });
    }
    serde_json::from_slice(&text).map(Some).map_err(damaged)
}

fn new_identity(dir: &Path, node: &NodeName) -> Result<Identity, NodeDirError> {
    // S18: copies whose owner is forgotten must not become a new node's.
    if !volumes_in(&dir.join(VOLUMES))?.is_empty() {
        return Err(NodeDirError::NoIdentity {
            file: dir.join(IDENTITY),
        });
    }
    let created = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let identity = Identity {
        format: FORMAT,
        node: node.clone(),
        cluster: None,
        created,
    };
    write_identity(dir, &identity)?;
    Ok(identity)
}

/// Replaces `node.json` as a whole: a crash leaves the old one or the new one.
fn write_identity(dir: &Path, identity: &Identity) -> Result<(), NodeDirError> {
    let (file, new) = (dir.join(IDENTITY), dir.join("node.json.new"));
    let text = serde_json::to_vec_pretty(identity).map_err(|e| at("write", &new)(e.into()))?;
    let mut out = File::create(&new).map_err(at("create", &new))?;
    out.write_all(&text)
        .and_then(|()| out.sync_all())
        .map_err(at("write", &new))?;
    fs::rename(&new, &file).map_err(at("replace", &file))?;
    os::sync_dir(dir).map_err(at("sync", dir))
}
