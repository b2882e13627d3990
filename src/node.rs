//! One node process.

use crate::cluster::config::NodeConfig;
use crate::cluster::fault::Fault;
use crate::cluster::join::{join, open_registry};

/// Runs a node until it is told to stop.
pub fn run(config: NodeConfig) -> Result<(), Fault> {
    let registry = open_registry(&config)?;
    let joined = join(config, registry)?;
    Err(Fault::internal(format!(
        "node {} joined, and this build has no engine",
        joined.node
    )))
}
