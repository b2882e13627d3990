//! One connection: the vhost-user messages of one front-end, and its rings as far as it has described them.
//!
//! A [`Session`] is made when a front-end connects and dropped whole when it goes; what outlives it is the
//! [`Device`]. Any error returned from a handler closes the connection, so errors are for what makes the session
//! useless; a request that can be refused without harm is logged and ignored.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    FrontendReq as Req, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfig,
    VhostUserConfigFlags, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
    VhostUserTransferDeviceState, VhostUserU64, VhostUserVringAddr, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};

use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryAtomic};

use super::GuestMem;
use super::capacity::Channel;
use super::config::{BLK_F_CONFIG_WCE, Device, F_LOG_ALL, F_PROTOCOL_FEATURES};
use super::dirty::{DirtyLog, RingLog};
use super::handover::Message;
use super::inflight::{InflightQueue, Region};
use super::plane::{DataPlane, ParkedRing, RingStart};
use super::ring::Ring;
use super::state::Incoming;
use super::table::{MAX_MEM_SLOTS, MemTable, SHARE_HINT, TableError};

/// Regions that every back-end takes in one SET_MEM_TABLE (VHOST_MEMORY_BASELINE_NREGIONS).
const MAX_TABLE: usize = 8;

/// Where the front-end says that a ring is, in its own address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct UserAddrs {
    desc: u64,
    avail: u64,
    used: u64,
}

/// A ring as the front-end described it: size, base, descriptors and the enable switch in the crate's vring state,
/// and beside it what that has no place for.
struct Vring {
    state: VringMutex<GuestMemoryAtomic<GuestMem>>,
    /// SET_VRING_NUM came. The crate's queue has its largest size until then, and would take that for said.
    sized: bool,
    /// Not translated before the ring starts: the memory table may come later.
    addrs: Option<UserAddrs>,
    /// Where the used ring is in the dirty log, if it is to be logged (VHOST_VRING_F_LOG).
    log_used: Option<GuestAddress>,
    /// The engine has it.
    running: bool,
}

impl Vring {
    fn new(max_size: u16) -> Self {
        // The engine's rings hold the memory that they were started with; this one stays empty.
        let nothing = GuestMemoryAtomic::new(GuestMem::new());
        let state =
            VringMutex::new(nothing, max_size).expect("the largest ring size is a power of two");
        Self {
            state,
            sized: false,
            addrs: None,
            log_used: None,
            running: false,
        }
    }

    fn size(&self) -> u16 {
        self.state.get_ref().get_queue().size()
    }

    fn base(&self) -> u16 {
        self.state.queue_next_avail()
    }

    fn is_enabled(&self) -> bool {
        self.state.get_ref().is_enabled()
    }

    fn has_kick(&self) -> bool {
        self.state.get_ref().get_kick().is_some()
    }

    /// Both descriptors once more.
    fn notifiers(&self) -> io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
        let state = self.state.get_ref();
        let kick = state.get_kick().as_ref().map(duplicate).transpose()?;
        let call = state.get_call().as_ref().map(duplicate).transpose()?;
        Ok((kick, call))
    }

    /// Gives out both descriptors, for the engine to own. None is left here: a ring that was stopped needs new ones.
    fn take_notifiers(&self) -> io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
        let notifiers = self.notifiers()?;
        self.forget_notifiers();
        Ok(notifiers)
    }

    fn forget_notifiers(&self) {
        self.state.set_kick(None);
        self.state.set_call(None);
    }
}

fn duplicate(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: `fd` is borrowed for the call, so its descriptor stays open meanwhile.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }.try_clone_to_owned()
}

/// The state of one connection.
pub(super) struct Session<'a> {
    device: &'a Device,
    plane: &'a mut dyn DataPlane,
    table: MemTable,
    vrings: Vec<Vring>,
    acked: u64,
    protocol: VhostUserProtocolFeatures,
    /// What SET_INFLIGHT_FD brought. Rings take their parts of it when they start.
    inflight: Option<Arc<Region>>,
    /// It was said that there is none.
    untracked: bool,
    /// What SET_LOG_BASE brought. In use while the features or a ring's flags say so.
    log: Option<Arc<DirtyLog>>,
    /// The way to tell the front-end of a new size.
    channel: Option<Channel>,
    /// A device state on its way here.
    incoming: Option<Incoming>,
}

/// An error with a reason for the log, which ends the connection.
fn refuse(reason: impl Into<String>) -> Error {
    Error::ReqHandlerError(io::Error::other(reason.into()))
}

impl<'a> Session<'a> {
    pub(super) fn new(device: &'a Device, plane: &'a mut dyn DataPlane) -> Session<'a> {
        let vrings = (0..device.config.num_queues)
            .map(|_| Vring::new(device.max_ring_size()))
            .collect();
        Session {
            device,
            plane,
            table: MemTable::default(),
            vrings,
            acked: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            inflight: None,
            untracked: false,
            log: None,
            channel: None,
            incoming: None,
        }
    }

    fn volume(&self) -> &str {
        &self.device.config.volume
    }

    /// Checks a queue number, and returns it in both shapes that are needed.
    fn queue(&self, index: u32) -> Result<(usize, u16)> {
        match u16::try_from(index) {
            Ok(number) if usize::from(number) < self.vrings.len() => {
                Ok((usize::from(number), number))
            }
            _ => Err(refuse(format!(
                "queue {index} does not exist: the volume is attached with {} queues, numbered from 0",
                self.vrings.len()
            ))),
        }
    }

    fn send_features(&mut self) {
        let writeback = self.device.is_writeback(self.acked);
        self.plane.set_features(self.acked, writeback);
    }

    fn memory_changed(&mut self, outcome: std::result::Result<(), TableError>) -> Result<()> {
        outcome.map_err(|e| refuse(e.to_string()))?;
        self.check_log()?;
        self.plane.set_memory(self.table.mem());
        Ok(())
    }

    fn logs_all(&self) -> bool {
        self.acked & F_LOG_ALL != 0
    }

    /// A write for which the log has no bit would be missing at the virtual machine's new place, and nobody would know:
    /// then rather no connection. QEMU sends a larger log before it adds memory.
    fn check_log(&self) -> Result<()> {
        let Some(log) = &self.log else {
            return Ok(());
        };
        let end = self.table.end();
        if self.logs_all() && !log.covers(end) {
            return Err(refuse(format!(
                "the dirty log is too small for guest memory, which ends at {end:#x}"
            )));
        }
        let mut running = self.vrings.iter().enumerate().filter(|(_, v)| v.running);
        running.try_for_each(|(index, vring)| self.check_used_log(index, vring))
    }

    fn check_used_log(&self, index: usize, vring: &Vring) -> Result<()> {
        let (Some(log), Some(used)) = (&self.log, vring.log_used) else {
            return Ok(());
        };
        let end = used.0.checked_add(Ring::used_len(vring.size()));
        if end.is_some_and(|end| log.covers(end)) {
            return Ok(());
        }
        Err(refuse(format!(
            "the used ring of queue {index} is to be logged at {:#x}, beyond the dirty log",
            used.0
        )))
    }

    /// What is logged of a ring: data by LOG_ALL, the used ring by the ring's own flag, and by LOG_ALL, too.
    fn ring_log(&self, vring: &Vring) -> Option<RingLog> {
        let (all, used) = (self.logs_all(), vring.log_used);
        let log = self.log.as_ref().filter(|_| all || used.is_some())?;
        Some(RingLog {
            log: Arc::clone(log),
            all,
            used,
        })
    }

    /// Tells the running rings what is logged from now on. Returned from, it is so.
    fn send_log(&mut self) -> Result<()> {
        self.check_log()?;
        for (at, number) in (0..self.vrings.len()).zip(0u16..) {
            if self.vrings[at].running {
                let log = self.ring_log(&self.vrings[at]);
                self.plane.set_log(number, log);
            }
        }
        Ok(())
    }

    /// LOG_ALL came, and the log is still to come: QEMU sends it last when it starts a device in the middle of a migration.
    /// Until then a ring must not write.
    fn awaits_log(&self) -> bool {
        let can_come = self.protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD);
        self.logs_all() && can_come && self.log.is_none()
    }

    /// Starts the ring if it has a kick descriptor and a place. Asked at KICK, and at ENABLE for a front-end that
    /// sends the addresses after the kick.
    fn start_if_complete(&mut self, index: u32) -> Result<()> {
        let (at, number) = self.queue(index)?;
        let vring = &self.vrings[at];
        let (false, true, Some(addrs)) = (vring.running, vring.has_kick(), vring.addrs) else {
            return Ok(());
        };
        if self.awaits_log() {
            log::debug!(
                "volume {}: queue {index} starts when the dirty log has come",
                self.volume()
            );
            return Ok(());
        }
        if self.table.is_empty() {
            return Err(refuse(format!(
                "queue {index} is started, but no memory was shared; {SHARE_HINT}"
            )));
        }
        if !vring.sized {
            return Err(refuse(format!("queue {index} is started without a size")));
        }
        let translate = |what, addr| {
            self.table.guest_addr(addr).ok_or_else(|| {
                refuse(format!(
                    "the {what} of queue {index} at {addr:#x} is in none of the shared regions; {SHARE_HINT}"
                ))
            })
        };
        let desc = translate("descriptor table", addrs.desc)?;
        let avail = translate("available ring", addrs.avail)?;
        let used = translate("used ring", addrs.used)?;
        let mem = self.table.mem();
        let inflight = self.tracked_by(number)?;

        let vring = &self.vrings[at];
        self.check_used_log(at, vring)?;
        let log = self.ring_log(vring);
        let notifiers = vring.take_notifiers();
        let (Some(kick), call) = notifiers.map_err(|e| refuse(format!("queue {index}: {e}")))?
        else {
            return Ok(());
        };
        let start = RingStart {
            index: number,
            size: vring.size(),
            desc,
            avail,
            used,
            next_avail: vring.base(),
            features: self.acked,
            enabled: vring.is_enabled(),
            kick,
            call,
            mem,
            inflight,
            log,
        };
        log::debug!(
            "volume {}: queue {index} starts with {} entries, the front-end says at {}",
            self.device.config.volume,
            start.size,
            start.next_avail
        );
        let first = !self.is_running();
        self.vrings[at].running = true;
        self.plane.start_ring(start).map_err(|e| {
            self.vrings[at].running = false;
            refuse(format!("queue {index} cannot start: {e}"))
        })?;
        if first {
            // QEMU reads the configuration once, when the device is made: not at a reconnection, and it ignores that it
            // changed while the device stands still. What happened meanwhile, also to a process before this one, is told now.
            self.tell_of_size();
        }
        Ok(())
    }

    fn is_running(&self) -> bool {
        self.vrings.iter().any(|vring| vring.running)
    }

    /// Whether a ring runs whose requests in flight nobody writes down.
    pub(super) fn runs_untracked(&self) -> bool {
        self.inflight.is_none() && self.is_running()
    }

    /// Has the rings stand still, and describes the connection for whoever takes it over.
    ///
    /// # Errors
    ///
    /// A sentence for people. The connection goes on as before.
    pub(super) fn pack(&mut self, patience: Duration) -> std::result::Result<Vec<Message>, String> {
        let parked = self.plane.park(patience)?;
        let described = self.describe(parked).map_err(|e| e.to_string());
        if described.is_err() {
            self.plane.unpark();
        }
        described
    }

    /// Nobody took it over: the rings go on.
    pub(super) fn unpack(&mut self) {
        self.plane.unpark();
    }

    /// The messages that bring a fresh back-end to where this one is. Each ring's kick comes when all else is known of it,
    /// so that the ring starts with that.
    fn describe(&self, parked: Vec<ParkedRing>) -> io::Result<Vec<Message>> {
        // Asked, because the message layer goes by what it has offered.
        let mut all = vec![Message::bare(Req::GET_FEATURES)];
        let protocol = VhostUserU64::new(self.protocol.bits());
        if !self.protocol.is_empty() {
            all.push(Message::bare(Req::GET_PROTOCOL_FEATURES));
            all.push(Message::new(Req::SET_PROTOCOL_FEATURES, &protocol));
        }
        if self.acked != 0 || self.vrings.iter().any(Vring::is_enabled) {
            all.push(Message::new(
                Req::SET_FEATURES,
                &VhostUserU64::new(self.acked),
            ));
        }
        let has_config = self.protocol.contains(VhostUserProtocolFeatures::CONFIG);
        if has_config && self.acked & BLK_F_CONFIG_WCE != 0 {
            // It is in a file, too; but that may not have been written.
            let (offset, byte) = self.device.write_cache();
            let flags = VhostUserConfigFlags::WRITABLE;
            let config = VhostUserConfig::new(offset, 1, flags);
            let mut message = Message::new(Req::SET_CONFIG, &config);
            message.body.push(byte);
            all.push(message);
        }
        all.extend(self.describe_memory()?);
        if let Some(log) = &self.log {
            let (info, file) = log.describe()?;
            all.push(Message::new(Req::SET_LOG_BASE, &info).with(file));
        }
        if let Some(region) = &self.inflight {
            let (info, file) = region.describe()?;
            all.push(Message::new(Req::SET_INFLIGHT_FD, &info).with(file));
        }
        if let Some(channel) = &self.channel {
            let channel = channel.duplicate()?;
            all.push(Message::bare(Req::SET_BACKEND_REQ_FD).with(channel));
        }
        if let Some(incoming) = &self.incoming {
            // Before any ring runs: then there would be no state to load.
            let state = VhostUserTransferDeviceState::new(
                VhostTransferStateDirection::LOAD,
                VhostTransferStatePhase::STOPPED,
            );
            let message = Message::new(Req::SET_DEVICE_STATE_FD, &state);
            all.push(message.with(incoming.describe()?));
        }
        let mut parked: HashMap<u16, ParkedRing> =
            parked.into_iter().map(|ring| (ring.index, ring)).collect();
        for (vring, index) in self.vrings.iter().zip(0u16..) {
            let running = match (vring.running, parked.remove(&index)) {
                (true, None) => {
                    let why = format!("queue {index} runs, and its worker does not know it");
                    return Err(io::Error::other(why));
                }
                (_, running) => running,
            };
            all.extend(self.describe_vring(index, vring, running)?);
        }
        Ok(all)
    }

    fn describe_memory(&self) -> io::Result<Vec<Message>> {
        let regions = self.table.describe()?;
        if regions.is_empty() {
            return Ok(Vec::new());
        }
        let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if regions.len() > MAX_TABLE && self.protocol.contains(slots) {
            let add = regions.into_iter().map(|(region, file)| {
                let VhostUserMemoryRegion {
                    guest_phys_addr,
                    memory_size,
                    user_addr,
                    mmap_offset,
                } = region;
                let region = VhostUserSingleMemoryRegion::new(
                    guest_phys_addr,
                    memory_size,
                    user_addr,
                    mmap_offset,
                );
                Message::new(Req::ADD_MEM_REG, &region).with(file)
            });
            return Ok(add.collect());
        }
        // If it is more, one message has brought them before.
        let table = VhostUserMemory::new(regions.len() as u32);
        let mut message = Message::new(Req::SET_MEM_TABLE, &table);
        for (region, file) in regions {
            message.body.extend(region.as_slice());
            message.fds.push(file);
        }
        Ok(vec![message])
    }

    fn describe_vring(
        &self,
        index: u16,
        vring: &Vring,
        running: Option<ParkedRing>,
    ) -> io::Result<Vec<Message>> {
        let mut all = Vec::new();
        let state = |request, value: u32| {
            Message::new(request, &VhostUserVringState::new(index.into(), value))
        };
        if vring.sized {
            all.push(state(Req::SET_VRING_NUM, vring.size().into()));
        }
        let base = running
            .as_ref()
            .map_or(vring.base(), |ring| ring.next_avail);
        all.push(state(Req::SET_VRING_BASE, base.into()));
        if let Some(UserAddrs { desc, avail, used }) = vring.addrs {
            let flags = match vring.log_used {
                Some(_) => VhostUserVringAddrFlags::VHOST_VRING_F_LOG,
                None => VhostUserVringAddrFlags::empty(),
            };
            let log = vring.log_used.map_or(0, |at| at.0);
            let addrs = VhostUserVringAddr::new(index.into(), flags, desc, used, avail, log);
            all.push(Message::new(Req::SET_VRING_ADDR, &addrs));
        }
        // Without that feature there is no such message, and every ring is enabled.
        if self.acked & F_PROTOCOL_FEATURES != 0 {
            all.push(state(Req::SET_VRING_ENABLE, vring.is_enabled().into()));
        }
        let (kick, call) = match running {
            Some(ring) => (Some(ring.kick), ring.call),
            None => vring.notifiers()?,
        };
        let index = VhostUserU64::new(index.into());
        if let Some(call) = call {
            all.push(Message::new(Req::SET_VRING_CALL, &index).with(call));
        }
        if let Some(kick) = kick {
            all.push(Message::new(Req::SET_VRING_KICK, &index).with(kick));
        }
        Ok(all)
    }

    /// The front-end's own socket for what it did not ask.
    pub(super) fn set_channel(&mut self, channel: Channel) {
        self.channel = Some(channel);
    }

    /// The volume grew.
    pub(super) fn capacity_changed(&mut self) {
        let size = self.device.capacity.sectors();
        log::info!("volume {}: {size} sectors now", self.volume());
        if self.is_running() {
            self.tell_of_size();
        }
    }

    fn tell_of_size(&self) {
        let Some(channel) = &self.channel else {
            log::debug!(
                "volume {}: the front-end has no channel for changes: it learns of a new size when it is started again",
                self.volume()
            );
            return;
        };
        if let Err(e) = channel.config_changed() {
            log::warn!(
                "volume {}: the front-end cannot be told of the size: {e}",
                self.volume()
            );
        }
    }

    /// Starts all rings that only waited for something else.
    fn start_complete(&mut self) -> Result<()> {
        (0..self.vrings.len() as u32).try_for_each(|index| self.start_if_complete(index))
    }

    /// The part of the in-flight region for a queue that starts.
    fn tracked_by(&mut self, queue: u16) -> Result<Option<InflightQueue>> {
        if let Some(region) = &self.inflight {
            let part = InflightQueue::of(region, queue).ok_or_else(|| {
                refuse(format!(
                    "queue {queue} is started, but the in-flight region is for {} queues",
                    region.queues()
                ))
            });
            return part.map(Some);
        }
        if !std::mem::replace(&mut self.untracked, true) {
            let offered = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
            let why = if self.protocol.contains(offered) {
                "the front-end sent none"
            } else {
                "the front-end does not know INFLIGHT_SHMFD"
            };
            log::warn!(
                "volume {}: no in-flight region ({why}): should this process die, the guest may lose the requests in flight",
                self.volume()
            );
        }
        Ok(None)
    }

    /// Takes a running ring back from the engine and forgets its descriptors.
    fn stop(&mut self, at: usize, number: u16) -> std::result::Result<(), String> {
        let vring = &mut self.vrings[at];
        vring.forget_notifiers();
        if std::mem::take(&mut vring.running) {
            let base = self.plane.stop_ring(number)?;
            vring.state.set_queue_next_avail(base);
            log::debug!(
                "volume {}: queue {number} stopped at {base}",
                self.device.config.volume
            );
        }
        Ok(())
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // Whoever hears of the end finds nothing of the front-end's open.
        self.channel = None;
        // Before the memory table goes.
        self.plane.disconnected();
    }
}

/// Takes a notification descriptor from the front-end. It shares its open file description with the front-end, so
/// O_NONBLOCK is set for both, and never cleared: a blocked write or read would stop a whole worker.
fn notifier(file: File) -> Result<OwnedFd> {
    // Every read or write of a regular file succeeds at once, which would turn a loop over it into a spin, and epoll
    // does not take one.
    if file
        .metadata()
        .is_ok_and(|meta| meta.is_file() || meta.is_dir())
    {
        return Err(refuse(
            "a notification descriptor is a file, not an eventfd",
        ));
    }
    let fd = file.as_raw_fd();
    // SAFETY: these commands take no pointers, and the descriptor is open.
    let done = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
    };
    if !done {
        let error = io::Error::last_os_error();
        return Err(refuse(format!(
            "a notification descriptor is unusable: {error}"
        )));
    }
    Ok(file.into())
}

impl VhostUserBackendReqHandlerMut for Session<'_> {
    fn set_owner(&mut self) -> Result<()> {
        // The connection is the ownership; there is nothing to remember.
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated, and the specification recommends to ignore it: back-ends never agreed on what it resets.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        log::info!("volume {}: the front-end resets the device", self.volume());
        for (at, number) in (0..self.vrings.len()).zip(0u16..) {
            // Where it stopped does not matter any more.
            if let Err(why) = self.stop(at, number) {
                log::warn!("volume {}, queue {number}: {why}", self.volume());
            }
            self.vrings[at] = Vring::new(self.device.max_ring_size());
        }
        if let Some(region) = &self.inflight {
            region.reset();
        }
        // Memory and protocol features belong to the connection and stay.
        self.acked = 0;
        self.send_features();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.device.features();
        if unknown != 0 {
            return Err(refuse(format!(
                "features {unknown:#x} were acknowledged but never offered"
            )));
        }
        let switched = (self.acked ^ features) & F_LOG_ALL != 0;
        self.acked = features;
        self.send_features();
        if switched {
            let (on, volume) = (self.logs_all(), self.volume());
            log::info!(
                "volume {volume}: logging of writes to guest memory is {}",
                if on { "on" } else { "off" }
            );
            if on && self.log.is_none() && self.vrings.iter().any(|vring| vring.running) {
                log::warn!(
                    "volume {volume}: there is no log yet, and rings run: what they write meanwhile is not logged"
                );
            }
            self.send_log()?;
            // One may have waited for a log that is not to come any more.
            self.start_complete()?;
        }
        if features & F_PROTOCOL_FEATURES == 0 {
            // Such a front-end cannot send ENABLE: its rings are enabled from the start.
            for (at, number) in (0..self.vrings.len()).zip(0u16..) {
                let vring = &self.vrings[at];
                let paused = !vring.is_enabled();
                vring.state.set_enabled(true);
                if paused && vring.running {
                    self.plane.set_enabled(number, true);
                }
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let outcome = self.table.replace(regions, files);
        self.memory_changed(outcome)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEM_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let outcome = self.table.add(region, file);
        self.memory_changed(outcome)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let outcome = self.table.remove(region);
        self.memory_changed(outcome)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (at, _) = self.queue(index)?;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= self.device.max_ring_size() => {
                self.vrings[at].state.set_queue_size(size);
                self.vrings[at].sized = true;
                Ok(())
            }
            _ => Err(refuse(format!(
                "queue {index} cannot have {num} entries: a power of two up to {} is possible",
                self.device.max_ring_size()
            ))),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let (at, number) = self.queue(index)?;
        let addrs = UserAddrs {
            desc: descriptor,
            avail: available,
            used,
        };
        let vring = &mut self.vrings[at];
        if vring.running && vring.addrs != Some(addrs) {
            // QEMU repeats the addresses of a running ring to switch dirty logging; moving one is not allowed.
            return Err(refuse(format!("queue {index} was moved while it runs")));
        }
        // Translated when the ring starts, because the memory table may come later.
        vring.addrs = Some(addrs);
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        vring.log_used = logged.then_some(GuestAddress(log));
        self.check_log()?;
        if self.vrings[at].running {
            let log = self.ring_log(&self.vrings[at]);
            self.plane.set_log(number, log);
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (at, _) = self.queue(index)?;
        // The upper half is for packed rings.
        self.vrings[at].state.set_queue_next_avail(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (at, number) = self.queue(index)?;
        self.stop(at, number)
            .map_err(|why| refuse(format!("queue {index} cannot say where it stopped: {why}")))?;
        Ok(VhostUserVringState::new(
            index,
            u32::from(self.vrings[at].base()),
        ))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (at, number) = self.queue(index.into())?;
        let Some(file) = fd else {
            return Err(refuse(format!(
                "queue {index} has no kick descriptor, and polling is not offered"
            )));
        };
        let kick = notifier(file)?;
        if self.vrings[at].running {
            self.plane.set_kick(number, kick);
            return Ok(());
        }
        self.vrings[at].state.set_kick(Some(kick.into()));
        self.start_if_complete(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (at, number) = self.queue(index.into())?;
        let call = fd.map(notifier).transpose()?;
        if self.vrings[at].running {
            self.plane.set_call(number, call);
        } else {
            self.vrings[at].state.set_call(call.map(File::from));
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        // Front-ends set it and do not listen; a broken ring is reported in the log.
        self.queue(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.device.protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.device.protocol_features().bits();
        if unknown != 0 {
            // The message layer acts on these bits, so it must not see any that we did not offer.
            return Err(refuse(format!(
                "protocol features {unknown:#x} were acknowledged but never offered"
            )));
        }
        self.protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (at, number) = self.queue(index)?;
        self.vrings[at].state.set_enabled(enable);
        if self.vrings[at].running {
            self.plane.set_enabled(number, enable);
            return Ok(());
        }
        if enable {
            self.start_if_complete(index)?;
        }
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // An error here is sent as an empty answer and does not close the connection.
        self.device.read_config(offset, size).ok_or_else(|| {
            log::warn!(
                "volume {}: the front-end reads {size} bytes of configuration space at {offset}, which is out of range",
                self.volume()
            );
            Error::InvalidParam
        })
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        // Success in either case: an error would close the connection, and with it the guest's disk, for what a
        // guest can ask for by itself.
        match self.device.write_config(offset, buf) {
            Ok(()) => {
                let writeback = self.device.is_writeback(self.acked);
                log::info!(
                    "volume {}: the guest switched to {}",
                    self.volume(),
                    if writeback {
                        "writeback"
                    } else {
                        "write-through"
                    }
                );
                self.send_features();
            }
            Err(e) => log::warn!(
                "volume {}: a change of configuration space is refused: {e}",
                self.volume()
            ),
        }
        Ok(())
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        // Only made and given away: the front-end sends it back before it starts a ring.
        Region::create(asked, self.device.config.num_queues).map_err(|e| refuse(e.to_string()))
    }

    fn set_inflight_fd(&mut self, info: &VhostUserInflight, file: File) -> Result<()> {
        if let Some(queue) = self.vrings.iter().position(|vring| vring.running) {
            // It goes on writing to the old one, of which the front-end would know nothing after a crash.
            return Err(refuse(format!(
                "the in-flight region is replaced while queue {queue} runs"
            )));
        }
        let region = Region::open(info, file, self.device.config.num_queues)
            .map_err(|e| refuse(e.to_string()))?;
        self.inflight = Some(Arc::new(region));
        Ok(())
    }

    /// Answered, also without REPLY_ACK, by the message layer when this returns: from then on nothing is written to the
    /// log before, so that the front-end may take what is in that and give it away.
    fn set_log_base(&mut self, info: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::open(info, file).map_err(|e| refuse(e.to_string()))?;
        self.log = Some(Arc::new(log));
        self.send_log()?;
        self.start_complete()
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        channel: File,
    ) -> Result<Option<File>> {
        // An error is sent as such and does not close the connection.
        if let Some(queue) = self.vrings.iter().position(|vring| vring.running) {
            log::warn!(
                "volume {}: device state is asked for while queue {queue} runs",
                self.volume()
            );
            return Err(Error::InvalidParam);
        }
        self.incoming = match direction {
            // Closed by being dropped: that is the end of the state, and all of it.
            VhostTransferStateDirection::SAVE => None,
            VhostTransferStateDirection::LOAD => Some(Incoming::new(channel)),
        };
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let Some(incoming) = self.incoming.take() else {
            return Ok(());
        };
        incoming.check().map_err(|why| {
            log::warn!("volume {}: {why}", self.volume());
            refuse(why)
        })
    }

    // What follows is never offered. The message layer refuses most of it by itself.

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is not a GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }
}
