//! The engine's end of a vhost-user control thread: every call becomes a message to the worker that owns the rings.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::command::{Command, GuestAnswer, GuestCommand, Mailbox};
use super::write_cache::WriteCache;
use crate::guest::{DataPlane, GuestMem, ParkedRing, RingLog, RingStart};
use crate::replication::ids::{Nanos, VolumeId};

/// Longest wait for a worker's answer. Above the time a ring may take to drain ([`super::rings::DRAIN`]); QEMU holds
/// its virtual machine still meanwhile.
const PATIENCE: Nanos = Nanos::from_ms(10_000);

/// One volume's control thread's way to its worker.
pub struct Plane {
    /// The worker.
    pub mailbox: Mailbox,
    /// The volume.
    pub volume: VolumeId,
    /// Survives this process.
    pub write_cache: WriteCache,
}

impl Plane {
    fn ask(&self, command: GuestCommand) -> GuestAnswer {
        let answer = self.mailbox.ask(PATIENCE, |reply| {
            Command::Guest(self.volume, command, reply)
        });
        answer.unwrap_or_else(|| Err("the volume's worker does not answer".into()))
    }

    fn tell(&self, command: GuestCommand) {
        if let Err(why) = self.ask(command) {
            log::warn!("volume {}: {why}", self.volume);
        }
    }
}

impl DataPlane for Plane {
    fn start_ring(&mut self, start: RingStart) -> Result<(), String> {
        self.ask(GuestCommand::Start(start)).map(|_| ())
    }

    fn set_kick(&mut self, index: u16, kick: OwnedFd) {
        self.tell(GuestCommand::Kick(index, kick));
    }

    fn set_call(&mut self, index: u16, call: Option<OwnedFd>) {
        self.tell(GuestCommand::Call(index, call));
    }

    fn stop_ring(&mut self, index: u16) -> Result<u16, String> {
        self.ask(GuestCommand::Stop(index))
    }

    fn set_enabled(&mut self, index: u16, enabled: bool) {
        self.tell(GuestCommand::Enabled(index, enabled));
    }

    fn set_memory(&mut self, mem: Arc<GuestMem>) {
        self.tell(GuestCommand::Memory(mem));
    }

    fn set_log(&mut self, index: u16, log: Option<RingLog>) {
        self.tell(GuestCommand::Log(index, log));
    }

    fn set_features(&mut self, acked: u64, writeback: bool) {
        // A guest that cannot flush gets write-through whatever the switch says: that is not the switch.
        if acked & (1 << VIRTIO_BLK_F_FLUSH) != 0 {
            self.write_cache.set(writeback);
        }
        self.tell(GuestCommand::Features { writeback });
    }

    fn park(&mut self, patience: Duration) -> Result<Vec<ParkedRing>, String> {
        let patience = Nanos(patience.as_nanos() as u64);
        let limit = Nanos(PATIENCE.0 + patience.0);
        let answer = self
            .mailbox
            .ask(limit, |reply| Command::Park(self.volume, patience, reply));
        answer.unwrap_or_else(|| Err("the volume's worker does not answer".into()))
    }

    fn unpark(&mut self) {
        self.mailbox.send(Command::Unpark(self.volume));
    }

    fn disconnected(&mut self) {
        self.tell(GuestCommand::Disconnected);
    }
}
