//! Nodes, volumes and where their copies live: what people ask for is written to the registry, and one control loop a
//! node makes it so.
//!
//! The way of a request: `api` parses it and calls an operation here ([`create`], [`attach`], [`update`], [`remove`]);
//! the operation changes records by compare-and-swap through the typed [`store`]; every node's [`control`] loop sees
//! the change by its watch and calls its [`host::Host`]; the operation waits until the records or the live status say
//! that it happened. Nothing is remembered elsewhere, so a node that restarts does what the records say.

pub mod attach;
pub mod config;
pub mod create;
pub mod events;
pub mod fault;
pub mod health;
pub mod host;
pub mod join;
pub mod labels;
pub mod live;
pub mod metrics;
pub mod model;
pub mod placement;
pub mod plane;
pub mod settings;
pub mod snapshot;
pub mod store;
pub mod units;
pub mod update;
