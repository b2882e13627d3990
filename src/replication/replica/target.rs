//! The copy as the target of a sync (PROTOCOL 6): from the mark that makes it unreadable to the one that makes it whole.

use super::*;
use crate::replication::ids::VOLUME_MAX;

impl<D> Replica<D> {
    /// An attachment that owns the record in `config.epoch` is to bring this copy up to date.
    pub(super) fn begin_sync(&mut self, session: SessionId, config: Configuration) {
        let least = self.state.promised.max(self.state.epoch);
        if config.epoch < least {
            return self.refuse(session, Refusal::Stale { promised: least });
        }
        if config.size > VOLUME_MAX {
            return self.refuse(session, Refusal::NoRoom);
        }
        for old in [self.bound.take(), self.bulk.take()].into_iter().flatten() {
            if old != session {
                let promised = config.epoch;
                self.refuse(old, Refusal::Stale { promised });
            }
        }
        self.drop_queue();
        self.serial = Some(Serial::BeginSync {
            session,
            config,
            before: None,
        });
    }

    /// Durable before the first byte of the sync: neither readable nor promotable. What an earlier session wrote has left the
    /// disk queue first: late, it would undo what this one writes.
    pub(super) fn become_target(&mut self, session: SessionId, config: Configuration) {
        if self.data_in_flight > 0 || self.log.running() || self.bitmaps_running {
            self.serial = Some(Serial::BeginSync {
                session,
                config,
                before: None,
            });
            return;
        }
        if self.makes_room(&config) {
            self.serial = Some(Serial::BeginSync {
                session,
                config,
                before: None,
            });
            return;
        }
        let before = self.disk_state(config.epoch, false);
        self.role = Role::Target {
            epoch: config.epoch,
            tag: config.tag,
        };
        (self.state.promised, self.size) = (config.epoch, config.size);
        self.state.standing = Standing::Inconsistent;
        self.state.clean = false;
        self.log.renumber();
        self.logged = true;
        if let Err(refusal) = self.keep_bitmaps(&config) {
            return self.refuse(session, refusal);
        }
        self.serial = Some(Serial::BeginSync {
            session,
            config,
            before: Some(before),
        });
        self.write_superblock();
    }

    pub(super) fn target_ready(&mut self, session: SessionId, before: Option<DiskState>) {
        let Some(disk) = before else { return };
        self.bound = Some(session);
        (self.holder, self.promised_to, self.unclaimed) = (None, None, None);
        self.released = false;
        self.heard = self.now;
        let text = format!(
            "in epoch {}, from what it had in epoch {}",
            disk.promised, disk.epoch
        );
        self.event("6 target", text);
        let ticket = session.0;
        self.reply(session, Message::SyncReady { disk, ticket });
    }

    /// The bulk connection of the session that holds the copy.
    pub(super) fn admit_bulk(&mut self, session: SessionId, ticket: u64) {
        let target = matches!(self.role, Role::Target { .. });
        if !target || self.bound != Some(SessionId(ticket)) {
            let promised = self.state.promised;
            return self.refuse(session, Refusal::Stale { promised });
        }
        if let Some(old) = self.bulk.replace(session)
            && old != session
        {
            let promised = self.state.promised;
            self.refuse(old, Refusal::Stale { promised });
        }
    }

    /// A change of epoch, or of the size, goes over the other connection, so that a request here may be of the one before or
    /// after. The ticket has shown whose they are, and every in-sync copy knows until a flush where they write (S11, S12).
    pub(super) fn bulk_request(&mut self, session: SessionId, message: Message, data: Option<D>) {
        match (message, data) {
            (Message::SyncHash(request), None) => {
                let status = self.outside(&request, self.room());
                self.hash(session, request, status);
            }
            (Message::SyncData(request), Some(data)) => {
                let status = self.outside(&request, self.room());
                self.sync_data(session, request, status, Change::Write(data));
            }
            // A chunk of zeros.
            (Message::WriteZeroes { request, unmap }, None) => {
                let status = self.outside(&request, self.room());
                self.sync_data(session, request, status, Change::Zero { unmap });
            }
            (
                Message::MapRead {
                    seq,
                    copy,
                    first,
                    count,
                    ..
                },
                None,
            ) => self.read_map(session, true, (seq, copy, first, count)),
            (Message::Flush { seq, .. }, None) => self.flush_disk(session, seq),
            (other, data) => self.unexpected(session, &other, data.is_some()),
        }
    }

    /// A chunk of the sync that differs: every in-sync copy has it in its bitmap for this one or in its log (S11), so it needs no
    /// place in the log here; and it needs none to be free there, so that a sync goes on while the log is full. What could not be
    /// compared comes as an ordinary write instead.
    pub(super) fn sync_data(
        &mut self,
        session: SessionId,
        request: Request,
        status: Option<Status>,
        change: Change<D>,
    ) {
        let target = matches!(self.role, Role::Target { .. });
        match status {
            Some(status) => self.ack(session, request.seq, status),
            None if !target => self.unexpected(session, &Message::SyncData(request), true),
            None => self.issue(session, request, change, false),
        }
    }

    pub(super) fn hash(&mut self, session: SessionId, request: Request, status: Option<Status>) {
        let (seq, span) = (request.seq, request.span);
        match status {
            Some(status) => self.reply_hash(session, seq, status, 0),
            None => self.start(Op::Hash { session, seq }, DiskOp::Hash { span }),
        }
    }

    pub(super) fn hashed(&mut self, session: SessionId, seq: Seq, result: &DiskResult<D>) {
        match result {
            DiskResult::Hash(hash) => self.reply_hash(session, seq, Status::Ok, *hash),
            _ => self.reply_hash(session, seq, Status::Io, 0),
        }
    }

    fn reply_hash(&mut self, session: SessionId, seq: Seq, status: Status, hash: u128) {
        self.reply(session, Message::SyncHashReply { seq, status, hash });
    }

    /// Everything is here, flushed.
    pub(super) fn end_sync(&mut self, session: SessionId, epoch: Epoch) {
        match self.role {
            Role::Target { epoch: mine, .. } if mine == epoch => {
                self.serial = Some(Serial::EndSync {
                    session,
                    marked: false,
                })
            }
            _ => {
                let promised = self.state.promised;
                self.refuse(session, Refusal::Stale { promised });
            }
        }
    }

    /// The bitmaps first: as a member this copy may be the one that others are brought up to date from.
    pub(super) fn advance_end_of_sync(&mut self, session: SessionId, marked: bool) {
        self.serial = Some(Serial::EndSync { session, marked });
        if self.log.running() || self.bitmaps_running {
            return;
        }
        if !marked && self.maps.iter().any(Option::is_some) {
            self.serial = Some(Serial::EndSync {
                session,
                marked: true,
            });
            let all = self.all_regions();
            return self.start_bitmaps(all, Vec::new());
        }
        if let Role::Target { epoch, tag } = self.role {
            // From now on this copy's writes are of this epoch and mandatory; whether it counts, the record says (S13).
            assert!(epoch >= self.state.epoch, "S2: no epoch ever decreases");
            (self.state.epoch, self.state.tag) = (epoch, tag);
            self.state.standing = Standing::InSync;
            self.role = Role::Member;
        }
        self.write_superblock();
    }

    pub(super) fn sync_ended(&mut self, session: SessionId) {
        let epoch = self.state.epoch;
        self.event("6 synced", format!("has everything in epoch {epoch}"));
        self.bulk = None;
        self.reply(session, Message::SyncDoneAck { epoch });
    }
}
