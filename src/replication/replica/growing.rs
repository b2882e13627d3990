//! Making room for a larger volume (PROTOCOL 11.4), beside the requests under way: first the files, then the superblock that
//! says so, then the answer. What a copy has room for never shrinks, and says nothing about the volume's size: that is the
//! configuration's.

use super::*;
use crate::replication::ids::VOLUME_MAX;

/// Somebody waits for room.
#[derive(Debug)]
pub(super) struct Asked {
    session: SessionId,
    seq: Seq,
    size: u64,
}

impl<D> Replica<D> {
    /// The bytes that this copy has room for.
    pub fn room(&self) -> u64 {
        self.state.size
    }

    /// An attachment wants room.
    pub(super) fn grow(&mut self, session: SessionId, epoch: Epoch, seq: Seq, size: u64) {
        if !self.current(epoch) {
            return self.ack(session, seq, Status::Stale);
        }
        if size > VOLUME_MAX {
            return self.ack(session, seq, Status::NoSpace);
        }
        self.growing.push(Asked { session, seq, size });
    }

    /// Has the disk make room, one size at a time and never beside a superblock: each states the size.
    pub(super) fn start_growing(&mut self) {
        let Some(size) = self.growing.iter().map(|a| a.size).max() else {
            return;
        };
        if self.state_running() {
            return;
        }
        if size > self.state.size {
            self.start(Op::Grow(size), DiskOp::Grow { size });
        } else if self.recorded < size {
            self.serial = Some(Serial::Grown);
            self.write_superblock();
        } else {
            // It is there already.
            self.answer_grown();
        }
    }

    /// Whether the disk works on files or superblock.
    pub(super) fn state_running(&self) -> bool {
        let state = |op: &Op| matches!(op, Op::Superblock(_) | Op::Grow(_));
        self.ops.iter().any(|(_, op)| state(op))
    }

    /// Whether what `config` asks for needs room first; then the disk makes it, and the step goes on afterwards.
    pub(super) fn makes_room(&mut self, config: &Configuration) -> bool {
        let size = config.size;
        let needed = size > self.state.size;
        if needed {
            self.start(Op::Grow(size), DiskOp::Grow { size });
        }
        needed
    }

    /// The files are long enough, durably. Every superblock from now on says so.
    pub(super) fn has_grown(&mut self, size: u64) {
        self.state.size = self.state.size.max(size);
        let size = self.state.size;
        self.log.grow(size);
        // The tail is zeros here and on every other copy: nobody lacks anything of it.
        self.maps.iter_mut().flatten().for_each(|m| m.grow(size));
        self.event("11.4 room", format!("for {size} bytes"));
    }

    /// No room, and nothing changed.
    pub(super) fn cannot_grow(&mut self, size: u64) {
        self.event("11.4 no room", format!("for {size} bytes"));
        let have = self.state.size;
        for asked in self.growing.extract_if(.., |a| a.size > have) {
            let (session, seq, status) = (asked.session, asked.seq, Status::NoSpace);
            self.actions.push_back(Action::Ack {
                session,
                seq,
                status,
            });
        }
        let waits = match &self.serial {
            Some(
                Serial::Configure {
                    session, config, ..
                }
                | Serial::BeginSync {
                    session, config, ..
                },
            ) if config.size > have => *session,
            _ => return,
        };
        self.serial = None;
        self.refuse(waits, Refusal::NoRoom);
        self.take_inbox();
    }

    /// A superblock is durable, and the size that it states with it.
    pub(super) fn answer_grown(&mut self) {
        self.recorded = self.state.size;
        let have = self.state.size;
        for asked in self.growing.extract_if(.., |a| a.size <= have) {
            let (session, seq, status) = (asked.session, asked.seq, Status::Ok);
            self.actions.push_back(Action::Ack {
                session,
                seq,
                status,
            });
        }
    }

    /// The disk has failed.
    pub(super) fn stop_growing(&mut self) {
        for asked in std::mem::take(&mut self.growing) {
            self.ack(asked.session, asked.seq, Status::Io);
        }
    }

    pub(super) fn forget_growing(&mut self, session: SessionId) {
        self.growing.retain(|a| a.session != session);
    }
}
