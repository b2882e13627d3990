//! Nodes, volumes and where their copies live: what people ask for is written to the registry, and one control loop a
//! node makes it so.
//!
//! The way of a request: `api` parses it and calls an operation here ([`create`], [`attach`], [`update`]); the
//! operation changes records by compare-and-swap through the typed [`store`]; every node's control loop sees the
//! change by its watch and calls its [`host::Host`]; the operation waits until the records or the live status say
//! that it happened. Nothing is remembered elsewhere, so a node that restarts does what the records say.
//!
//! A node starts in two steps, because its engine needs what the first one brings: [`join::Place`] takes ports and
//! name and knows the cluster; [`start`] begins to act with the engine that was built meanwhile. A node that has been in its cluster
//! before takes both steps without the registry, and acts when that has answered.

pub mod attach;
pub mod config;
mod control;
mod control_attach;
mod control_copies;
mod control_creation;
mod control_drain;
mod control_migrate;
mod control_replace;
mod control_scrub;
mod control_seen;
mod control_tend;
pub mod create;
mod declared;
pub mod drain;
pub mod events;
pub mod fault;
#[cfg(test)]
pub(crate) mod fixture;
pub mod health;
pub mod host;
pub mod join;
pub mod labels;
pub mod live;
pub mod membership;
pub mod metrics;
pub mod migrate;
pub mod model;
mod names;
pub mod namespaces;
pub mod nodes;
pub mod placement;
pub mod plane;
pub mod policy;
pub mod reach;
pub mod registry_move;
pub mod replicas;
pub mod rules;
pub mod scrub;
pub mod selector;
pub mod settings;
pub mod sight;
mod silence;
pub mod snapshot;
pub mod store;
pub mod units;
pub mod update;
pub mod view;
mod whois;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::api::Servers;
use control::Control;
use events::What;
use fault::Fault;
use host::Host;
use join::Membership;
use plane::Plane;

use crate::registry::Presence;

/// A node's running management plane.
pub struct Cluster {
    plane: Arc<Plane>,
    stop: Arc<AtomicBool>,
    servers: Servers,
    threads: Vec<JoinHandle<()>>,
    /// Ends last: until then this process is one that runs.
    presence: Option<Presence>,
}

/// Begins to act: the API answers, and the control loop makes `host` do what the records say, as soon as the cluster knows this
/// process.
pub fn start(joined: Membership, host: Arc<dyn Host>) -> Result<Cluster, Fault> {
    let plane = Arc::new(Plane::new(&joined, host));
    let Membership {
        http,
        api,
        config,
        security,
        replication,
        ..
    } = joined;
    let stop = plane.stop_flag();
    let port = replication.local_addr().map_or(0, |at| at.port());
    drop(replication);
    let servers = Servers::start(&plane, http, api)?;
    plane
        .events
        .push(What::node("", "up", "start").text(format!("instance {}", plane.instance)));
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        thread::Builder::new()
            .name(name.into())
            .spawn(work)
            .map_err(|e| Fault::internal(format!("no thread for {name}: {e}")))
    };
    let control = Control::new(plane.clone(), stop.clone());
    let mut threads = vec![spawn("control", Box::new(move || control.run()))?];
    for (name, watch) in [
        ("silence", silence::watch as fn(&Plane)),
        ("names", names::watch),
    ] {
        let watched = plane.clone();
        threads.push(spawn(name, Box::new(move || watch(&watched)))?);
    }
    {
        let (plane, stop) = (plane.clone(), stop.clone());
        threads.push(spawn(
            "reach",
            Box::new(move || reach::run(&plane, &security, port, &stop)),
        )?);
    }
    if !config.serve.is_empty() {
        let (plane, stop) = (plane.clone(), stop.clone());
        threads.push(spawn(
            "declared",
            Box::new(move || declared::run(&plane, config.serve, &stop)),
        )?);
    }
    let mut cluster = Cluster {
        plane,
        stop,
        servers,
        threads,
        presence: None,
    };
    if cluster.plane.waits().is_none() {
        cluster.joined();
    }
    Ok(cluster)
}

impl Cluster {
    /// The cluster knows this process now.
    pub fn joined(&mut self) {
        let plane = &self.plane;
        let presence = plane.store.announce(&plane.node).map_err(|e| {
            // A hint less for people; volumes do not depend on it.
            log::warn!("{e}; when this node does not answer, others cannot tell whether it runs");
        });
        self.presence = presence.ok();
        plane.set_waits(None);
    }

    /// It does not yet, and this is why.
    pub fn waits(&self, why: &str) {
        self.plane.set_waits(Some(why.into()));
    }

    /// Whether what the records say has been served once: what they do not ask for is not asked for.
    pub fn has_acted(&self) -> bool {
        self.plane.has_acted()
    }

    /// Why this process must end, if it must: its name belongs to another one now.
    pub fn fatal(&self) -> Option<String> {
        self.plane.fatal()
    }

    /// Takes no more requests and acts no more. What is attached stays in its spec, so that the node serves it again
    /// after a restart; releasing it is the host's affair.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.servers.stop();
        for thread in self.threads {
            if thread.join().is_err() {
                log::error!("a thread of the management plane panicked");
            }
        }
        self.plane.events.push(What::node("up", "down", "stop"));
    }
}
