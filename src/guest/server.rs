//! The socket of one attached volume, and the thread that serves front-ends on it, one after another.
//!
//! While one front-end is connected, others wait in the listener's backlog: the kernel lets them connect, and they
//! are answered when the first one goes. The listener is never closed in between, so a front-end that reconnects
//! (QEMU does so for ever, cloud-hypervisor for a minute) always finds it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::capacity::{Capacity, peek_channel};
use super::config::{Device, DeviceConfig};
use super::plane::DataPlane;
use super::session::Session;
use super::socket::{Claim, ServeError};
use super::table::SHARE_HINT;

/// Pause after a failed accept, in milliseconds: it fails when descriptors run out, and would fail again at once.
const ACCEPT_RETRY_MS: libc::c_int = 1000;
const FOR_EVER: libc::c_int = -1;

/// A volume that is being served. Dropping it stops.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    claim: Claim,
    thread: Option<JoinHandle<()>>,
}

/// What the control thread and its owner share.
#[derive(Debug)]
struct Shared {
    device: Device,
    stopping: AtomicBool,
    connected: AtomicBool,
    /// Wakes the thread while it waits for a front-end.
    wake: EventFd,
    /// Wakes it while it waits for a message: shutting the socket down ends any read.
    current: Mutex<Option<UnixStream>>,
}

/// A socket that front-ends can connect to, though nobody answers them yet. Dropped, it is removed.
#[derive(Debug)]
pub struct Bound {
    listener: UnixListener,
    claim: Claim,
    device: Device,
}

impl Bound {
    /// Binds the socket (mode 0660, directories created, a dead process's leftover removed), so that it is known
    /// whether that is possible before anything else is begun.
    ///
    /// # Errors
    ///
    /// [`ServeError`]: the configuration is not acceptable, the path belongs to somebody else, or the system refuses.
    pub fn new(config: DeviceConfig, path: &Path) -> Result<Bound, ServeError> {
        let device = Device::new(config)?;
        let (listener, claim) = Claim::bind(path)?;
        Ok(Bound {
            listener,
            claim,
            device,
        })
    }

    /// The size that the guest is shown; whoever serves the volume raises it.
    pub fn capacity(&self) -> Capacity {
        self.device.capacity.clone()
    }

    /// Serves `plane`, which must be ready for all calls (a front-end may be waiting), until [`stop`](Server::stop).
    ///
    /// # Errors
    ///
    /// The system refuses.
    pub fn serve(self, plane: Box<dyn DataPlane>) -> Result<Server, ServeError> {
        let Bound {
            listener,
            claim,
            device,
        } = self;
        let path = claim.path();
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(ServeError::io("make an eventfd for", path))?;
        let shared = Arc::new(Shared {
            device,
            stopping: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            wake,
            current: Mutex::new(None),
        });
        let for_thread = Arc::clone(&shared);
        let thread = listener.set_nonblocking(true).and_then(|()| {
            std::thread::Builder::new()
                .name("vhost-user".into())
                .spawn(move || for_thread.run(&listener, plane))
        });
        let thread = thread.map_err(ServeError::io("start serving", path))?;
        log::info!(
            "volume {}: serving on {}",
            shared.device.config.volume,
            path.display()
        );
        Ok(Server {
            shared,
            claim,
            thread: Some(thread),
        })
    }
}

impl Server {
    /// [`Bound::new`], then [`Bound::serve`].
    ///
    /// # Errors
    ///
    /// Those of both.
    pub fn spawn(
        config: DeviceConfig,
        path: &Path,
        plane: Box<dyn DataPlane>,
    ) -> Result<Server, ServeError> {
        Bound::new(config, path)?.serve(plane)
    }

    /// As [`Bound::capacity`].
    pub fn capacity(&self) -> Capacity {
        self.shared.device.capacity.clone()
    }

    /// Whether a front-end is connected now.
    pub fn connected(&self) -> bool {
        self.shared.connected.load(Ordering::Acquire)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        self.claim.path()
    }

    /// Removes the socket, closes the connection and ends the thread. Returns when the data plane has been told of
    /// the disconnect; takes no longer than the data plane's longest call.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.claim.release();
        self.shared.stopping.store(true, Ordering::SeqCst);
        // An eventfd refuses only when its counter is full, and then the thread is awake.
        let _ = self.shared.wake.write(1);
        if let Some(stream) = self.shared.current().as_ref() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if thread.join().is_err() {
            log::error!(
                "volume {}: the vhost-user thread panicked",
                self.shared.device.config.volume
            );
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// How a connection ended.
enum End {
    /// Between two messages.
    HungUp,
    /// During a message, or because of what it said.
    Failed(Option<FrontendReq>, Error),
    /// The socket itself failed.
    Io(io::Error),
}

impl Shared {
    fn current(&self) -> MutexGuard<'_, Option<UnixStream>> {
        // It holds one value that is only ever replaced, so a panic elsewhere cannot have left it half-changed.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn run(&self, listener: &UnixListener, mut plane: Box<dyn DataPlane>) {
        let volume = &self.device.config.volume;
        while !self.stopping() {
            match listener.accept() {
                Ok((stream, _)) => self.connection(stream, plane.as_mut()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(&[self.wake.as_raw_fd(), listener.as_raw_fd()], FOR_EVER);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::warn!("volume {volume}: cannot accept a front-end, will try again: {e}");
                    wait(&[self.wake.as_raw_fd()], ACCEPT_RETRY_MS);
                }
            }
        }
    }

    /// Serves one front-end until it goes, or until it says something that cannot be answered.
    fn connection(&self, stream: UnixStream, plane: &mut dyn DataPlane) {
        let volume = &self.device.config.volume;
        let handle = match stream
            .set_nonblocking(false)
            .and_then(|()| stream.try_clone())
        {
            Ok(handle) => handle,
            Err(e) => {
                log::warn!("volume {volume}: a connection is unusable: {e}");
                return;
            }
        };
        *self.current() = Some(handle);
        // After the handle is in place: a stop that came before did not find it.
        if !self.stopping() {
            log::debug!("volume {volume}: a front-end connected");
            self.connected.store(true, Ordering::Release);
            let end = self.messages(stream, plane);
            self.connected.store(false, Ordering::Release);
            self.log_end(&end);
        }
        *self.current() = None;
    }

    fn messages(&self, stream: UnixStream, plane: &mut dyn DataPlane) -> End {
        let session = Arc::new(Mutex::new(Session::new(&self.device, plane)));
        // The message layer wants a blocking socket: part of a message is an error to it otherwise.
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
        // A panic in a handler has ended the thread, and this with it.
        let session = || session.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.device.capacity.take_change() {
                session().capacity_changed();
            }
            if !is_ready(handler.as_raw_fd(), self.device.capacity.event()) {
                continue;
            }
            // SAFETY: the descriptor belongs to `handler`, which lives on, and the borrow ends with the statement.
            let request = match next_request(unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) })
            {
                Ok(Next::HungUp) => return End::HungUp,
                Ok(Next::Message(request)) => request,
                Err(e) => return End::Io(e),
            };
            let channel = match request {
                // SAFETY: as above.
                Some(FrontendReq::SET_BACKEND_REQ_FD) => {
                    match peek_channel(unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) }) {
                        Ok(channel) => channel,
                        Err(e) => return End::Io(e),
                    }
                }
                _ => None,
            };
            if let Err(e) = handler.handle_request() {
                return End::Failed(request, e);
            }
            // Only what the message layer has accepted: the feature was negotiated, and it is a socket.
            if let Some(channel) = channel {
                session().set_channel(channel);
            }
        }
    }

    fn log_end(&self, end: &End) {
        let volume = &self.device.config.volume;
        if self.stopping() {
            log::info!("volume {volume}: connection closed, the volume is no longer served");
            return;
        }
        match end {
            End::HungUp => log::info!("volume {volume}: the front-end disconnected"),
            End::Io(e) => log::warn!("volume {volume}: connection lost: {e}"),
            End::Failed(_, Error::Disconnected | Error::PartialMessage) => {
                log::warn!(
                    "volume {volume}: the front-end disconnected in the middle of a message"
                );
            }
            End::Failed(request, e) => {
                let name = request.map_or("a message".into(), |request| format!("{request:?}"));
                let hint = match (request, e) {
                    // The message layer found no descriptors where memory was to come, and says only "invalid".
                    (
                        Some(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG),
                        Error::InvalidMessage | Error::InvalidParam | Error::IncorrectFds,
                    ) => format!("; {SHARE_HINT}"),
                    _ => String::new(),
                };
                log::warn!("volume {volume}: connection closed because of {name}: {e}{hint}");
            }
        }
    }
}

enum Next {
    HungUp,
    /// A message has begun; which one, if its first four bytes are here and known.
    Message(Option<FrontendReq>),
}

/// Waits for the next message and looks at its type without taking it, so that an error can be told with a name, and
/// a front-end that went away between two messages from one that broke off.
fn next_request(socket: BorrowedFd<'_>) -> io::Result<Next> {
    let mut code = [0u8; 4];
    loop {
        // SAFETY: the buffer is writable for its length. Peeking leaves attached descriptors where they are.
        let n = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                code.as_mut_ptr().cast(),
                code.len(),
                libc::MSG_PEEK,
            )
        };
        return match n {
            0 => Ok(Next::HungUp),
            4 => Ok(Next::Message(
                FrontendReq::try_from(u32::from_ne_bytes(code)).ok(),
            )),
            1.. => Ok(Next::Message(None)),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => continue,
                e if e.kind() == io::ErrorKind::ConnectionReset => Ok(Next::HungUp),
                e => Err(e),
            },
        };
    }
}

/// Waits until `socket` or `event` is readable, or nobody knows; whether `socket` is (also: hung up).
fn is_ready(socket: i32, event: i32) -> bool {
    let ready = wait(&[socket, event], FOR_EVER);
    ready.first() == Some(&true)
}

/// Waits until one of the descriptors is readable or the time is up; which are. Errors end the wait, as they end a poll that
/// was interrupted: the caller looks again.
fn wait(fds: &[i32], timeout_ms: libc::c_int) -> Vec<bool> {
    let mut fds: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: the array is valid for its length, and the descriptors are open.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
    fds.iter().map(|fd| fd.revents != 0).collect()
}
