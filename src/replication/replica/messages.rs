//! What a copy accepts from an attachment, and on which conditions (PROTOCOL 2, 4, 5).

use super::*;
use crate::replication::fence;
use crate::replication::ids::VOLUME_MAX;

impl<D> Replica<D> {
    pub(super) fn dispatch(&mut self, session: SessionId, message: Message, data: Option<D>) {
        if self.state.standing == Standing::Failed {
            return self.refuse_failed(session);
        }
        match message {
            Message::Promise(promise) => return self.promise(session, promise),
            Message::Attach(config) => return self.configure(session, config, true),
            Message::SyncBegin(config) => return self.begin_sync(session, config),
            Message::SyncBulk { ticket, .. } => return self.admit_bulk(session, ticket),
            _ => {}
        }
        if self.bulk == Some(session) {
            return self.bulk_request(session, message, data);
        }
        if self.bound != Some(session) {
            return self.refuse(
                session,
                Refusal::Stale {
                    promised: self.state.promised,
                },
            );
        }
        match (message, data) {
            (Message::EpochChange(config), None) => self.configure(session, config, false),
            (Message::Write(request), Some(data)) => {
                self.change(session, request, Change::Write(data))
            }
            (Message::WriteZeroes { request, unmap }, None) => {
                self.change(session, request, Change::Zero { unmap })
            }
            (Message::Discard(request), None) => {
                self.change(session, request, Change::Zero { unmap: true })
            }
            (Message::Read(request), into) => self.read(session, request, into),
            (Message::Flush { epoch, seq }, None) => self.flush(session, epoch, seq),
            (
                Message::Heartbeat {
                    epoch,
                    sent,
                    stable,
                },
                None,
            ) => {
                // A promise above this epoch ends the lease: no answer (PROTOCOL 4).
                if self.current(epoch) {
                    self.log.stable(stable);
                    self.reply(session, Message::HeartbeatAck { epoch, sent });
                }
            }
            (
                Message::MapRead {
                    epoch,
                    seq,
                    copy,
                    first,
                    count,
                },
                None,
            ) => self.read_map(session, self.current(epoch), (seq, copy, first, count)),
            (Message::SyncHash(request), None) => {
                let status = self.invalid(&request);
                self.hash(session, request, status);
            }
            (Message::SyncData(request), Some(data)) => {
                let status = self.invalid(&request);
                self.sync_data(session, request, status, Change::Write(data));
            }
            (
                Message::Mark {
                    epoch,
                    seq,
                    copy,
                    regions,
                },
                None,
            ) => self.mark(session, epoch, seq, copy, regions),
            (Message::Clear { epoch, copy, runs }, None) => self.clear(epoch, copy, &runs),
            (Message::SyncDone { epoch }, None) => self.end_sync(session, epoch),
            (Message::Grow { epoch, seq, size }, None) => self.grow(session, epoch, seq, size),
            (Message::Detach { epoch }, None) => {
                if self.current(epoch) {
                    self.serial = Some(Serial::Detach { session, epoch });
                } else {
                    self.refuse(
                        session,
                        Refusal::Stale {
                            promised: self.state.promised,
                        },
                    );
                }
            }
            (other, data) => self.unexpected(session, &other, data.is_some()),
        }
    }

    pub(super) fn unexpected(&mut self, session: SessionId, message: &Message, payload: bool) {
        let with = if payload { " with a payload" } else { "" };
        let text = format!("{}{with}", name(message));
        self.refuse(session, Refusal::Protocol(text));
    }

    /// S7: what is of another epoch, or of one below the promise, is not accepted.
    pub(super) fn current(&self, epoch: Epoch) -> bool {
        let mine = match self.role {
            Role::Member => self.state.epoch,
            Role::Target { epoch, .. } => epoch,
        };
        fence::accepts(mine, self.state.promised, epoch)
    }

    pub(super) fn promise(&mut self, session: SessionId, promise: Promise) {
        if self.state.standing == Standing::Inconsistent {
            return self.refuse(session, Refusal::Inconsistent);
        }
        let again = self
            .promised_to
            .as_ref()
            .is_some_and(|(_, h)| h.instance == promise.instance);
        if !fence::promises(self.state.promised, promise.epoch, again) {
            return self.refuse(
                session,
                Refusal::Stale {
                    promised: self.state.promised,
                },
            );
        }
        if let Some(refusal) = self.old_attachment_alive(&promise) {
            return self.refuse(session, refusal);
        }
        if promise.probe {
            let answer = self.disk_state(promise.epoch, true);
            return self.reply(session, Message::PromiseAck(answer));
        }
        // From here on nothing of an older epoch is accepted; what is in the disk queue ends first (PROTOCOL 5).
        if let Some(old) = self.bound.take()
            && old != session
        {
            self.refuse(
                old,
                Refusal::Stale {
                    promised: promise.epoch,
                },
            );
        }
        self.drop_queue();
        self.event(
            "5.2 promise",
            format!("promising epoch {} to {}", promise.epoch, promise.candidate),
        );
        self.serial = Some(Serial::Promise { session, promise });
    }

    pub(super) fn old_attachment_alive(&self, promise: &Promise) -> Option<Refusal> {
        let same = self
            .holder
            .as_ref()
            .is_some_and(|h| h.instance == promise.instance);
        let holder = self.holder.as_ref().map(|h| &h.node);
        let proven = fence::is_proven(promise, self.state.epoch, holder);
        let silent = self.now.since(self.heard);
        if same || proven || self.released || silent >= self.timing.grace {
            return None;
        }
        let node = self
            .holder
            .as_ref()
            .map_or_else(|| NodeName("an unknown node".into()), |h| h.node.clone());
        Some(Refusal::Attached {
            node,
            heard_ms: silent.as_ms(),
        })
    }

    pub(super) fn disk_state(&self, promised: Epoch, probe: bool) -> DiskState {
        DiskState {
            promised,
            probe,
            epoch: self.state.epoch,
            tag: self.state.tag,
            boot_id: self.boot_id,
            clean: self.state.clean,
            regions: self.log.named(),
        }
    }

    pub(super) fn configure(&mut self, session: SessionId, config: Configuration, attach: bool) {
        let mine = (self.state.epoch, self.state.tag);
        if !fence::configures(mine, self.state.promised, config.epoch, config.tag) {
            return self.refuse(
                session,
                Refusal::Stale {
                    promised: self.state.promised.max(mine.0),
                },
            );
        }
        let target = matches!(self.role, Role::Target { .. }) && !attach;
        if self.state.standing == Standing::Inconsistent && !target {
            return self.refuse(session, Refusal::Inconsistent);
        }
        if config.size > VOLUME_MAX {
            return self.refuse(session, Refusal::NoRoom);
        }
        if attach {
            if let Some(old) = self.bound.take()
                && old != session
            {
                self.refuse(
                    old,
                    Refusal::Stale {
                        promised: config.epoch,
                    },
                );
            }
            // Writes of a former connection of the same attachment will be sent again.
            self.drop_queue();
        }
        self.serial = Some(Serial::Configure {
            session,
            config,
            attach,
        });
    }

    pub(super) fn change(&mut self, session: SessionId, request: Request, change: Change<D>) {
        if let Some(status) = self.invalid(&request) {
            return self.ack(session, request.seq, status);
        }
        // The chunk is marked for every copy that misses this write. The bit in memory is enough: until the region
        // leaves the log, and it leaves only after its bits are on disk, a restart marks the whole region (PROTOCOL 5.5).
        for (map, mirrored) in self.maps.iter_mut().zip(self.mirrored) {
            if let Some(map) = map
                && !mirrored
            {
                map.set_span(request.span);
            }
        }
        if !self.logged {
            return self.issue(session, request, change, false);
        }
        let touched = self.touch(&request);
        if touched && self.log.covers(request.span) {
            self.issue(session, request, change, true);
        } else {
            self.queue.push_back(Queued {
                session,
                request,
                change,
                touched,
            });
        }
    }

    pub(super) fn touch(&mut self, request: &Request) -> bool {
        for (n, region) in request.span.regions().enumerate() {
            if self.log.touch(region, request.seq, self.now) == Touch::Full {
                request
                    .span
                    .regions()
                    .take(n)
                    .for_each(|r| self.log.done(r));
                return false;
            }
        }
        true
    }

    pub(super) fn issue(
        &mut self,
        session: SessionId,
        request: Request,
        change: Change<D>,
        logged: bool,
    ) {
        // S15: log before data.
        assert!(
            !logged || self.log.covers(request.span),
            "S15: the region is durable in the log before its data"
        );
        let (span, dsync) = (request.span, request.fua);
        let op = match change {
            Change::Write(data) => DiskOp::Write { span, data, dsync },
            Change::Zero { unmap } => DiskOp::Zero { span, unmap, dsync },
        };
        self.data_in_flight += 1;
        self.start(
            Op::Data {
                session,
                request,
                logged,
            },
            op,
        );
    }

    pub(super) fn read(&mut self, session: SessionId, request: Request, into: Option<D>) {
        match self.invalid(&request) {
            Some(status) => self.reply(
                session,
                Message::ReadReply {
                    seq: request.seq,
                    status,
                },
            ),
            None => self.start(
                Op::Read {
                    session,
                    seq: request.seq,
                },
                DiskOp::Read {
                    span: request.span,
                    into,
                },
            ),
        }
    }

    pub(super) fn invalid(&self, request: &Request) -> Option<Status> {
        if !self.current(request.epoch) {
            return Some(Status::Stale);
        }
        self.outside(request, self.size)
    }

    /// Why the range is none of the first `size` bytes.
    pub(super) fn outside(&self, request: &Request, size: u64) -> Option<Status> {
        let Span { offset, len } = request.span;
        let inside = offset
            .checked_add(u64::from(len))
            .is_some_and(|end| end <= size);
        let aligned = offset % SECTOR == 0 && u64::from(len) % SECTOR == 0 && len > 0;
        (!inside || !aligned).then_some(Status::Io)
    }

    pub(super) fn flush(&mut self, session: SessionId, epoch: Epoch, seq: Seq) {
        if !self.current(epoch) {
            return self.ack(session, seq, Status::Stale);
        }
        self.flush_disk(session, seq);
    }

    pub(super) fn flush_disk(&mut self, session: SessionId, seq: Seq) {
        // Everything acknowledged so far left the disk queue before this sync starts; later flushes share the next one.
        if self.flushing.is_some() {
            self.flush_next.push((session, seq));
        } else {
            self.flushing = Some(vec![(session, seq)]);
            self.start(Op::Sync, DiskOp::Sync);
        }
    }
}

fn name(message: &Message) -> String {
    let text = format!("{message:?}");
    text.split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_string()
}
