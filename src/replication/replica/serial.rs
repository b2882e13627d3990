//! What a copy does one at a time, everything else of the session waiting behind it: promising, taking a configuration,
//! leaving, failing (PROTOCOL 3, 5).

use super::*;
use crate::replication::mutants::{self, Mutant};

impl<D> Replica<D> {
    /// Takes the serial step as far as it goes now.
    pub(super) fn advance_serial(&mut self) {
        if self.state_running() {
            return;
        }
        match self.serial.take() {
            Some(Serial::Promise { session, promise }) => {
                let drained = self.data_in_flight == 0;
                if drained {
                    self.state.promised = promise.epoch;
                }
                self.serial = Some(Serial::Promise { session, promise });
                if drained && mutants::on(Mutant::SkipPromiseFsync) {
                    self.superblock_written();
                } else if drained {
                    self.write_superblock();
                }
            }
            Some(Serial::Configure {
                session,
                config,
                attach,
            }) => {
                // A write of a former connection that is still in the disk queue will be sent again: were it to land
                // after the second one and after a later overlapping write, it would undo that one. It ends first.
                let waits = attach && self.data_in_flight > 0;
                if waits || self.makes_room(&config) {
                    self.serial = Some(Serial::Configure {
                        session,
                        config,
                        attach,
                    });
                } else {
                    self.begin_configuration(session, config, attach);
                }
            }
            Some(Serial::Detach { session, epoch }) => {
                self.serial = Some(Serial::Detach { session, epoch });
                let busy = self.log.running() || self.bitmaps_running;
                if self.data_in_flight > 0 || !self.queue.is_empty() || busy {
                    // What the log still wants is added first, so that emptying it finds nothing half-way.
                    return self.start_transaction();
                }
                match self
                    .log
                    .transaction(self.now, false, false)
                    .or_else(|| self.log.empty())
                {
                    Some(txn) => self.write_transaction(txn),
                    None => {
                        self.state.clean = true;
                        self.write_superblock();
                    }
                }
            }
            Some(Serial::BeginSync {
                session,
                config,
                before: None,
            }) => self.become_target(session, config),
            Some(Serial::EndSync { session, marked }) => self.advance_end_of_sync(session, marked),
            Some(serial @ (Serial::BeginSync { .. } | Serial::Grown)) => {
                self.serial = Some(serial);
                self.write_superblock();
            }
            Some(Serial::Failing) => {
                self.serial = Some(Serial::Failing);
                self.write_superblock();
            }
            None => {}
        }
    }

    pub(super) fn begin_configuration(
        &mut self,
        session: SessionId,
        config: Configuration,
        attach: bool,
    ) {
        let s = &mut self.state;
        match &mut self.role {
            Role::Member => {
                assert!(
                    config.epoch >= s.epoch && config.epoch >= s.promised,
                    "S2: no epoch ever decreases on a disk"
                );
                (s.epoch, s.tag) = (config.epoch, config.tag);
            }
            Role::Target { epoch, tag } => (*epoch, *tag) = (config.epoch, config.tag),
        }
        assert!(config.epoch >= s.promised, "S2: no promise is taken back");
        s.promised = config.epoch;
        s.clean = false;
        self.size = config.size;
        if let Err(refusal) = self.keep_bitmaps(&config) {
            return self.refuse(session, refusal);
        }
        self.logged = config.logged;
        self.serial = Some(Serial::Configure {
            session,
            config,
            attach,
        });
        self.write_superblock();
    }

    pub(super) fn write_superblock(&mut self) {
        let state = Box::new(self.state.clone());
        self.start(Op::Superblock(state.standing), DiskOp::Superblock(state));
    }

    pub(super) fn superblock_written(&mut self) {
        self.answer_grown();
        match self.serial.take() {
            Some(Serial::Promise { session, promise }) => {
                let holder = Holder {
                    node: promise.candidate,
                    instance: promise.instance,
                };
                // S11: an attachment leaves, and one of the same process comes after it, with numbers from 1 on. Were what the
                // former called stable to count, its writes would leave the log before any flush.
                self.log.renumber();
                self.holder = Some(holder.clone());
                self.promised_to = Some((session, holder));
                self.unclaimed = Some(promise.epoch);
                self.released = false;
                self.heard = self.now;
                let answer = self.disk_state(promise.epoch, false);
                self.reply(session, Message::PromiseAck(answer));
            }
            Some(Serial::Configure {
                session,
                config,
                attach,
            }) => {
                self.bound = Some(session);
                let claimant = self
                    .promised_to
                    .as_ref()
                    .is_some_and(|(s, _)| *s == session);
                if self.unclaimed.take().is_some_and(|e| config.epoch > e) && !claimant {
                    // S8: Y was promised e + 1 and never took the volume, X went above it and is attached. Were Y still
                    // taken for the attachment, its next attempt would be promised without the grace, X being alive.
                    self.holder = None;
                }
                self.promised_to = None;
                self.heard = self.now;
                let epoch = config.epoch;
                self.event(
                    "8 configuration",
                    format!("epoch {epoch}, {} bitmaps kept", config.absent.len()),
                );
                self.reply(
                    session,
                    if attach {
                        Message::AttachAck { epoch }
                    } else {
                        Message::EpochAck { epoch }
                    },
                );
            }
            Some(Serial::Detach { session, epoch }) => {
                self.bound = None;
                self.released = true;
                self.event("5 clean detach", format!("released in epoch {epoch}"));
                self.reply(session, Message::DetachAck { epoch });
            }
            Some(Serial::BeginSync {
                session, before, ..
            }) => self.target_ready(session, before),
            Some(Serial::EndSync { session, .. }) => self.sync_ended(session),
            Some(Serial::Grown | Serial::Failing) | None => {}
        }
        self.take_inbox();
    }

    /// What waited behind a serial step.
    pub(super) fn take_inbox(&mut self) {
        while self.serial.is_none() {
            let Some((session, message, data)) = self.inbox.pop_front() else {
                break;
            };
            self.dispatch(session, message, data);
        }
    }

    /// This copy is dead for good: a failed write or flush is never retried (PROTOCOL 3).
    pub(super) fn fail(&mut self, why: &'static str) {
        if self.state.standing == Standing::Failed {
            return;
        }
        self.state.standing = Standing::Failed;
        self.event("3 failed disk", why.into());
        for w in &self.queue {
            let (session, seq, status) = (w.session, w.request.seq, Status::Io);
            self.actions.push_back(Action::Ack {
                session,
                seq,
                status,
            });
        }
        self.drop_queue();
        self.stop_growing();
        let flushes = self.flushing.take().into_iter().flatten();
        for (session, seq) in flushes
            .chain(std::mem::take(&mut self.flush_next))
            .collect::<Vec<_>>()
        {
            self.ack(session, seq, Status::Io);
        }
        for session in [self.bound.take(), self.bulk.take()].into_iter().flatten() {
            self.refuse_failed(session);
        }
        for (session, ..) in std::mem::take(&mut self.inbox) {
            self.refuse_failed(session);
        }
        if let Some(
            Serial::Promise { session, .. }
            | Serial::Configure { session, .. }
            | Serial::BeginSync { session, .. }
            | Serial::EndSync { session, .. }
            | Serial::Detach { session, .. },
        ) = self.serial.replace(Serial::Failing)
        {
            self.refuse_failed(session);
        }
    }

    /// Whether the disk works on data of somebody's request.
    pub(super) fn disk_works(&self) -> bool {
        self.ops
            .iter()
            .any(|(_, op)| matches!(op, Op::Data { .. } | Op::Read { .. } | Op::Hash { .. }))
    }

    /// Refuses the session, but not before the disk's last answer has gone out: write 1 fails while write 2, from the
    /// guest's memory, is in the disk queue; were the session ended at once, the answer to write 2 would be lost, and the
    /// attachment in this process could never tell the guest that its memory is free (S19).
    pub(super) fn refuse_failed(&mut self, session: SessionId) {
        if !self.disk_works() {
            self.refuse(session, Refusal::Failed);
        } else if !self.ending.contains(&session) {
            self.ending.push(session);
        }
    }
}
