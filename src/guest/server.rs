//! The socket of one attached volume, and the thread that serves front-ends on it, one after another.
//!
//! While one front-end is connected, others wait in the listener's backlog: the kernel lets them connect, and they
//! are answered when the first one goes. The listener is never closed in between, so a front-end that reconnects
//! (QEMU does so for ever, cloud-hypervisor for a minute) always finds it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::capacity::{Capacity, peek_channel};
use super::config::{Device, DeviceConfig};
use super::handover::{self, Handed, Message, Packed, Receipt};
use super::plane::DataPlane;
use super::session::Session;
use super::socket::{Claim, ServeError};
use super::table::SHARE_HINT;

/// Pause after a failed accept, in milliseconds: it fails when descriptors run out, and would fail again at once.
const ACCEPT_RETRY_MS: libc::c_int = 1000;
const FOR_EVER: libc::c_int = -1;
/// How long a front-end may take from the first byte of a message to its last, or to read what it was answered: while one is
/// connected no other can use the volume. As long as a ring that stops may take; one that works needs no millisecond.
const MESSAGE_MAX: Duration = Duration::from_secs(5);
/// Between two looks at a message that has begun, in milliseconds: it is readable all the time.
const LOOK_AGAIN_MS: libc::c_int = 10;
/// Bytes of a message's header: request, flags, size of the body.
const HEADER: usize = 12;
/// Larger bodies the message layer refuses unread.
const BODY_MAX: u32 = 4096;

/// A volume that is being served. Dropping it stops.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    claim: Claim,
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

/// Which connections are to stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Those with requests that nobody writes down: they must have ended, which may take long. The others go on meanwhile.
    Untracked,
    /// All.
    All,
}

/// How a server stands after it was asked to.
#[derive(Debug)]
pub enum Stand {
    /// It was not meant, and goes on.
    GoesOn,
    /// It takes no connection and answers nothing until [`Server::resume`].
    Still(Handed),
}

/// A server that was asked to stand still.
#[derive(Debug)]
pub struct Parking {
    answer: Receiver<Result<Stand, String>>,
    volume: String,
}

impl Parking {
    /// Waits for its answer, until `deadline` at most.
    ///
    /// # Errors
    ///
    /// [`Moves`]: it goes on when it is told to [resume](Server::resume).
    pub fn wait(self, deadline: Instant) -> Result<Stand, Moves> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.answer.recv_timeout(left) {
            Ok(Ok(stand)) => Ok(stand),
            Ok(Err(why)) => Err(Moves::Cannot(format!("volume {}: {why}", self.volume))),
            Err(_) => Err(Moves::Late),
        }
    }
}

/// Why a server does not stand still.
#[derive(Debug, thiserror::Error)]
pub enum Moves {
    /// It was asked and cannot: a sentence for people.
    #[error("{0}")]
    Cannot(String),
    /// Something that its front-end wants of it takes its time.
    #[error("its front-end is stopping a ring whose requests do not end")]
    Late,
}

/// What the control thread is asked between two messages.
enum Order {
    Park(Who, Duration, SyncSender<Result<Stand, String>>),
    Resume,
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
    /// A connection that the process before had.
    session: Option<Packed>,
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
            session: None,
        })
    }

    /// Takes over what the process before served at `path`, with its connection.
    ///
    /// # Errors
    ///
    /// The configuration is not acceptable.
    pub fn adopt(config: DeviceConfig, path: &Path, handed: Handed) -> Result<Bound, ServeError> {
        let Handed {
            listener,
            inode,
            session,
        } = handed;
        Ok(Bound {
            device: Device::new(config)?,
            listener: listener.into(),
            claim: Claim::adopt(path, inode),
            session,
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
            session,
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
        let (orders, received) = channel();
        let inode = claim.inode().map_err(ServeError::io("inspect", path))?;
        let thread = listener.set_nonblocking(true).and_then(|()| {
            std::thread::Builder::new()
                .name("vhost-user".into())
                .spawn(move || {
                    let door = Door {
                        listener,
                        inode,
                        orders: received,
                    };
                    for_thread.run(&door, session, plane);
                })
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
            orders,
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

    /// Asks the connection to stand still between two messages, its rings within `patience`, and to describe itself for the
    /// program that takes this one's place. Also when this fails it must be told to [resume](Server::resume).
    pub fn park(&self, who: Who, patience: Duration) -> Parking {
        let (reply, answer) = sync_channel(1);
        self.order(Order::Park(who, patience, reply));
        Parking {
            answer,
            volume: self.shared.device.config.volume.clone(),
        }
    }

    /// Closes the connection, as if its front-end had hung up. Whatever is being done for it ends first.
    pub fn hang_up(&self) {
        if let Some(stream) = self.shared.current().as_ref() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The program stays as it is: the connection goes on.
    pub fn resume(&self) {
        self.order(Order::Resume);
    }

    fn order(&self, order: Order) {
        // A thread that has ended needs no order.
        let _ = self.orders.send(order);
        let _ = self.shared.wake.write(1);
    }

    /// Removes the socket, closes the connection and ends the thread. Returns when the data plane has been told of
    /// the disconnect; takes no longer than the data plane's longest call.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.claim.release();
        self.shared.stopping.store(true, Ordering::SeqCst);
        // It may stand still. (An eventfd refuses only when its counter is full, and then the thread is awake.)
        self.order(Order::Resume);
        self.hang_up();
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

/// What the control thread has beside what it shares.
struct Door {
    listener: UnixListener,
    inode: OwnedFd,
    orders: Receiver<Order>,
}

impl Door {
    fn hand_over(&self, session: Option<Packed>) -> io::Result<Stand> {
        Ok(Stand::Still(Handed {
            listener: self.listener.as_fd().try_clone_to_owned()?,
            inode: self.inode.try_clone()?,
            session,
        }))
    }

    /// Does what the owner asks: `park` packs the connection, if there is one and it is meant, and `resume` has it go on.
    /// Returns when the thread may go on.
    fn obey(
        &self,
        mut park: impl FnMut(Who, Duration) -> Result<Stand, String>,
        mut resume: impl FnMut(),
    ) {
        let mut still = false;
        loop {
            let order = match still {
                true => self.orders.recv().ok(),
                false => self.orders.try_recv().ok(),
            };
            match order {
                Some(Order::Park(who, patience, reply)) => {
                    let stand = park(who, patience);
                    still = matches!(&stand, Ok(Stand::Still(_)));
                    let heard = reply.send(stand).is_ok();
                    if still && !heard {
                        // It took too long, and was given up.
                        still = false;
                        resume();
                    }
                }
                Some(Order::Resume) if still => {
                    still = false;
                    resume();
                }
                Some(Order::Resume) => {}
                None => return,
            }
        }
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
    /// It could not be taken over from the process before.
    NotTaken(String),
    /// Nothing came for [`MESSAGE_MAX`], though something must.
    Stalled(Stall),
}

/// What a front-end does not do.
#[derive(Debug, Clone, Copy)]
enum Stall {
    EndMessage,
    ReadAnswers,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stall::EndMessage => "has begun a message and does not end it",
            Stall::ReadAnswers => "does not read what it is answered",
        })
    }
}

impl Shared {
    fn current(&self) -> MutexGuard<'_, Option<UnixStream>> {
        // It holds one value that is only ever replaced, so a panic elsewhere cannot have left it half-changed.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn run(&self, door: &Door, session: Option<Packed>, mut plane: Box<dyn DataPlane>) {
        let volume = &self.device.config.volume;
        if let Some(Packed {
            stream,
            messages,
            receipt,
        }) = session
        {
            let past = Some((messages, receipt));
            self.connection(door, stream.into(), past, plane.as_mut());
        }
        while !self.stopping() {
            self.obey_alone(door);
            if self.stopping() {
                return;
            }
            let listener = &door.listener;
            match listener.accept() {
                Ok((stream, _)) => self.connection(door, stream, None, plane.as_mut()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let both = [self.wake.as_raw_fd(), listener.as_raw_fd()];
                    poll(both.map(|fd| (fd, libc::POLLIN)), FOR_EVER);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::warn!("volume {volume}: cannot accept a front-end, will try again: {e}");
                    poll([(self.wake.as_raw_fd(), libc::POLLIN)], ACCEPT_RETRY_MS);
                }
            }
        }
    }

    /// Does what the owner asks while nobody is connected.
    fn obey_alone(&self, door: &Door) {
        let _ = self.wake.read();
        let park = |who, _| match who {
            Who::Untracked => Ok(Stand::GoesOn),
            Who::All => door.hand_over(None).map_err(|e| e.to_string()),
        };
        door.obey(park, || ());
    }

    /// Serves one front-end until it goes, or until it says something that cannot be answered. With a `past` it was another
    /// process's before.
    fn connection(
        &self,
        door: &Door,
        stream: UnixStream,
        past: Option<(Vec<Message>, Receipt)>,
        plane: &mut dyn DataPlane,
    ) {
        let volume = &self.device.config.volume;
        let handle = match stream
            .set_nonblocking(false)
            // Messages are taken in when they are whole, as far as that can be seen (`progress`).
            .and_then(|()| stream.set_read_timeout(Some(MESSAGE_MAX)))
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
            let end = match past {
                None => self.serve(door, stream, plane),
                Some(past) => self.take_over(door, &stream, past, plane),
            };
            self.connected.store(false, Ordering::Release);
            self.log_end(&end);
        }
        *self.current() = None;
    }

    fn serve(&self, door: &Door, stream: UnixStream, plane: &mut dyn DataPlane) -> End {
        let session = Arc::new(Mutex::new(Session::new(&self.device, plane)));
        // The message layer wants a blocking socket: part of a message is an error to it otherwise.
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
        self.messages(door, &mut handler, &session)
    }

    /// Goes on with a connection where the process before left it.
    fn take_over(
        &self,
        door: &Door,
        stream: &UnixStream,
        (messages, receipt): (Vec<Message>, Receipt),
        plane: &mut dyn DataPlane,
    ) -> End {
        let session = Arc::new(Mutex::new(Session::new(&self.device, plane)));
        let pair = UnixStream::pair().and_then(|pair| pair.0.set_nonblocking(true).map(|()| pair));
        let (ours, theirs) = match pair {
            Ok(pair) => pair,
            Err(e) => return End::NotTaken(e.to_string()),
        };
        let mut handler = BackendReqHandler::from_stream(theirs, Arc::clone(&session));
        let taken = handover::replay(ours, messages, || self.message(&mut handler, &session));
        // SAFETY: the descriptor belongs to `handler`, which lives on, and the borrow ends with the statement.
        let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
        let taken = taken
            .and_then(|()| handover::replace(socket, stream.as_fd()).map_err(|e| e.to_string()));
        if let Err(why) = taken {
            return End::NotTaken(why);
        }
        receipt.taken();
        log::info!(
            "volume {}: the front-end of the process before is served on",
            self.device.config.volume
        );
        self.messages(door, &mut handler, &session)
    }

    /// Takes in messages until there are no more.
    fn messages<'a>(
        &self,
        door: &Door,
        handler: &mut BackendReqHandler<Mutex<Session<'a>>>,
        session: &Mutex<Session<'a>>,
    ) -> End {
        let mut begun = None;
        loop {
            if self.device.capacity.take_change() {
                lock(session).capacity_changed();
            }
            self.obey(door, handler, session);
            let done = match self.is_ready(handler, &mut begun) {
                Ok(true) => self.message(handler, session),
                Ok(false) if self.stopping() => Err(End::HungUp),
                waits => waits.map(|_| ()),
            };
            if let Err(end) = done {
                return end;
            }
        }
    }

    /// Does what the owner asks, between two messages.
    fn obey<'a>(
        &self,
        door: &Door,
        handler: &BackendReqHandler<Mutex<Session<'a>>>,
        session: &Mutex<Session<'a>>,
    ) {
        let _ = self.wake.read();
        let park = |who, patience| {
            if who == Who::Untracked && !lock(session).runs_untracked() {
                return Ok(Stand::GoesOn);
            }
            let messages = lock(session).pack(patience)?;
            let packed = || {
                // SAFETY: the descriptor belongs to `handler`, which lives on, and the borrow ends with the statement.
                let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
                door.hand_over(Some(Packed {
                    stream: socket.try_clone_to_owned()?,
                    messages,
                    receipt: Receipt::default(),
                }))
            };
            packed().map_err(|e| {
                lock(session).unpack();
                e.to_string()
            })
        };
        door.obey(park, || lock(session).unpack());
    }

    /// Takes in one message.
    fn message<'a>(
        &self,
        handler: &mut BackendReqHandler<Mutex<Session<'a>>>,
        session: &Mutex<Session<'a>>,
    ) -> Result<(), End> {
        // SAFETY: the descriptor belongs to `handler`, which lives on, and the borrow ends with the statement.
        let request = match next_request(unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) }) {
            Ok(Next::HungUp) => return Err(End::HungUp),
            Ok(Next::Message(request)) => request,
            Err(e) => return Err(End::Io(e)),
        };
        let channel = match request {
            // SAFETY: as above.
            Some(FrontendReq::SET_BACKEND_REQ_FD) => {
                peek_channel(unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) })
                    .map_err(End::Io)?
            }
            _ => None,
        };
        handler
            .handle_request()
            .map_err(|e| End::Failed(request, e))?;
        // Only what the message layer has accepted: the feature was negotiated, and it is a socket.
        if let Some(channel) = channel {
            lock(session).set_channel(channel);
        }
        Ok(())
    }

    /// Waits until the front-end has said something whole (also: hung up) and its answer can be written, or something else is
    /// to be done; whether it has. Since `begun` it has said a part of something: until all of it is here nothing is taken from
    /// the socket, so that the connection can stand still, and be handed over, as between two messages.
    fn is_ready(&self, handler: &impl AsRawFd, begun: &mut Option<Instant>) -> Result<bool, End> {
        let (events, timeout) = match begun {
            None => (libc::POLLIN | libc::POLLRDHUP, FOR_EVER),
            Some(_) => (libc::POLLRDHUP, LOOK_AGAIN_MS),
        };
        let (capacity, wake) = (self.device.capacity.event(), self.wake.as_raw_fd());
        let others = [capacity, wake].map(|fd| (fd, libc::POLLIN));
        let heard = poll(
            [(handler.as_raw_fd(), events), others[0], others[1]],
            timeout,
        )[0];
        if heard == 0 && begun.is_none() {
            return Ok(false);
        }
        // SAFETY: the descriptor belongs to `handler`, which lives on, and the borrow ends with the statement.
        let lacks = lacks(
            unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) },
            heard,
        );
        match lacks.map_err(End::Io)? {
            None => {
                *begun = None;
                Ok(true)
            }
            Some(stall) if begun.get_or_insert_with(Instant::now).elapsed() >= MESSAGE_MAX => {
                Err(End::Stalled(stall))
            }
            Some(_) => Ok(false),
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
            End::NotTaken(why) => log::error!(
                "volume {volume}: the front-end of the process before cannot be served on: {why}; its connection is closed, so that it connects again"
            ),
            End::Stalled(stall) => stalled(volume, *stall),
            End::Failed(_, Error::SocketRetry(_)) => stalled(volume, Stall::EndMessage),
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

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::HungUp => f.write_str("it ends"),
            End::Failed(_, e) => e.fmt(f),
            End::Io(e) => e.fmt(f),
            End::NotTaken(why) => f.write_str(why),
            End::Stalled(stall) => write!(f, "it {stall}"),
        }
    }
}

fn stalled(volume: &str, stall: Stall) {
    log::warn!(
        "volume {volume}: connection closed: its front-end {stall}, for {} s now, and nobody else can use the volume meanwhile; \
         it may connect again: let it go on if it was stopped, and restart it if it hangs",
        MESSAGE_MAX.as_secs()
    );
}

/// What is missing for a message to be taken in and answered without waiting for its front-end; `heard` is what the last poll
/// said of the socket.
fn lacks(socket: BorrowedFd<'_>, heard: libc::c_short) -> io::Result<Option<Stall>> {
    if heard & (libc::POLLHUP | libc::POLLERR) != 0 {
        // Nothing waits for anybody any more.
        return Ok(None);
    }
    // A quarter of the socket's buffer is free then, many times the longest answer.
    if poll([(socket.as_raw_fd(), libc::POLLOUT)], 0)[0] & libc::POLLOUT == 0 {
        return Ok(Some(Stall::ReadAnswers));
    }
    if heard & libc::POLLRDHUP != 0 {
        // There will be no more of it.
        return Ok(None);
    }
    let here = rustix::io::ioctl_fionread(socket)? as usize;
    let mut header = [0; HEADER];
    let is_whole = match peek(socket, &mut header)? {
        0 => true,
        HEADER => {
            let [.., a, b, c, d] = header;
            let body = u32::from_ne_bytes([a, b, c, d]);
            body > BODY_MAX || here >= HEADER + body as usize
        }
        // A look does not go beyond descriptors, which came with less than the header. What follows is not seen, and waited for
        // as long as the socket does.
        _ => here >= HEADER,
    };
    Ok((!is_whole).then_some(Stall::EndMessage))
}

/// Looks at the first bytes in a socket without taking them, or the descriptors that came along. None: it has hung up.
fn peek(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the buffer is writable for its length.
        let n = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                bytes.len(),
                libc::MSG_PEEK,
            )
        };
        match n {
            0.. => return Ok(n as usize),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e if e.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                e => return Err(e),
            },
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
    Ok(match peek(socket, &mut code)? {
        0 => Next::HungUp,
        4 => Next::Message(FrontendReq::try_from(u32::from_ne_bytes(code)).ok()),
        _ => Next::Message(None),
    })
}

/// A panic in a handler has ended the thread, and whoever locks with it.
fn lock<'a, 'b>(session: &'a Mutex<Session<'b>>) -> MutexGuard<'a, Session<'b>> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until something is to be said of the descriptors, beside what is asked for each, or the time is up. Errors end the
/// wait, as they end one that was interrupted: the caller looks again.
fn poll<const N: usize>(
    fds: [(RawFd, libc::c_short); N],
    timeout_ms: libc::c_int,
) -> [libc::c_short; N] {
    let mut fds = fds.map(|(fd, events)| libc::pollfd {
        fd,
        events,
        revents: 0,
    });
    // SAFETY: the array is valid for its length, and the descriptors are open.
    unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout_ms) };
    fds.map(|fd| fd.revents)
}
