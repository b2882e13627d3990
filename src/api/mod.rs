//! HTTP: the management API on the node's socket, and what may be read on its TCP port.
//!
//! Both speak the same JSON; the TCP port answers GET alone. Each has its own thread and runtime, so that commands
//! which wait on the one never delay the other, where nodes ask each other how they are.

pub mod client;
mod events;
mod html;
mod limit;
mod metrics;
mod policies;
mod prometheus;
mod read;
mod reply;
mod write;

use std::net;
use std::os::unix;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Builder;
use tokio::sync::watch;

use crate::cluster::fault::Fault;
use crate::cluster::plane::Plane;
use limit::Limited;

/// Commands that may wait at once on one listener; each holds a thread, an attach for up to a minute.
const BLOCKING_MAX: usize = 64;
/// What is in flight when the node stops has this long to be answered.
const DRAIN: Duration = Duration::from_secs(2);

/// The two servers of a node.
pub struct Servers {
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    /// Serves `plane` on the sockets that the node bound when it joined.
    pub fn start(
        plane: &Arc<Plane>,
        http: net::TcpListener,
        api: unix::net::UnixListener,
    ) -> Result<Self, Fault> {
        let fail = |what: &str, e: std::io::Error| Fault::internal(format!("{what}: {e}"));
        http.set_nonblocking(true)
            .and_then(|()| api.set_nonblocking(true))
            .map_err(|e| fail("the API's sockets", e))?;
        let (stop, stopped) = watch::channel(false);
        let reads = read::router()
            .merge(policies::reads())
            .with_state(plane.clone());
        let all = read::router()
            .merge(policies::all())
            .merge(write::router())
            .with_state(plane.clone());
        let threads = vec![
            spawn("http", reads, stopped.clone(), move || {
                TcpListener::from_std(http)
            })
            .map_err(|e| fail("the HTTP thread", e))?,
            spawn("api", all, stopped, move || UnixListener::from_std(api))
                .map_err(|e| fail("the API thread", e))?,
        ];
        Ok(Self { stop, threads })
    }

    /// Takes no more requests, answers those in flight and ends.
    pub fn stop(self) {
        // Nobody listening: the servers ended already.
        let _ = self.stop.send(true);
        for thread in self.threads {
            if thread.join().is_err() {
                log::error!("an API thread panicked");
            }
        }
    }
}

fn spawn<L>(
    name: &str,
    router: Router<()>,
    mut stopped: watch::Receiver<bool>,
    listener: impl FnOnce() -> std::io::Result<L> + Send + 'static,
) -> std::io::Result<JoinHandle<()>>
where
    L: Listener,
    L::Addr: std::fmt::Debug,
{
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_MAX)
        .build()?;
    let name = name.to_string();
    thread::Builder::new().name(name.clone()).spawn(move || {
        let serve = async {
            // A tokio listener belongs to the runtime that it is made in.
            let listener = match listener() {
                Ok(listener) => Limited::new(listener),
                Err(e) => {
                    log::error!("{name} is not served: {e}");
                    return;
                }
            };
            let mut told = stopped.clone();
            let graceful = async move {
                let _ = told.wait_for(|stop| *stop).await;
            };
            let server = axum::serve(listener, router).with_graceful_shutdown(graceful);
            let deadline = async {
                let _ = stopped.wait_for(|stop| *stop).await;
                tokio::time::sleep(DRAIN).await;
            };
            tokio::select! {
                ended = server => if let Err(e) = ended {
                    log::error!("{name} is no longer served: {e}");
                },
                () = deadline => {}
            }
        };
        runtime.block_on(serve);
        // A command that still waits sees its answer refused; what it wrote to the registry is acted on regardless.
        runtime.shutdown_background();
    })
}
