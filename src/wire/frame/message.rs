//! What each message puts into the header's fields and into the body, and how it is read back.

use super::{
    FLAG_ALL, FLAG_CLEAN, FLAG_FUA, FLAG_LOG_PRESSURE, FLAG_LOGGED, FLAG_LZ4, FLAG_PROBE,
    FLAG_UNMAP, Header, kind,
};
use crate::replication::ids::{
    BootId, CopyId, Epoch, IO_MAX, Instance, Nanos, NodeName, Region, Seq, Tag, ZERO_MAX,
};
use crate::replication::message::{
    Configuration, DiskState, MAP_CHUNKS, Message, Promise, Proof, Refusal, Status,
};
use crate::wire::WireError;
use crate::wire::body::{self, Reader, within};

/// Puts `message` into header fields, and the rest of it behind `out`.
pub(super) fn put_message(message: &Message, header: &mut Header, out: &mut Vec<u8>) {
    match message {
        Message::Promise(p) => {
            header.kind = kind::PROMISE;
            header.epoch = p.epoch.0;
            header.set(FLAG_PROBE, p.probe);
            let (proof, released) = match p.proof {
                Proof::None => (0, 0),
                Proof::Released(epoch) => (1, epoch.0),
                Proof::PredecessorDead => (2, 0),
            };
            out.push(proof);
            out.extend_from_slice(&u64::to_le_bytes(released));
            out.extend_from_slice(&p.instance.0);
            body::put_text(out, body::name(&p.candidate));
        }
        Message::PromiseAck(d) => {
            header.kind = kind::PROMISE_ACK;
            put_disk_state(d, header, out);
        }
        Message::Attach(c) => put_configuration(kind::ATTACH, c, header, out),
        Message::EpochChange(c) => put_configuration(kind::EPOCH_CHANGE, c, header, out),
        Message::AttachAck { epoch } => (header.kind, header.epoch) = (kind::ATTACH_ACK, epoch.0),
        Message::EpochAck { epoch } => (header.kind, header.epoch) = (kind::EPOCH_ACK, epoch.0),
        Message::Detach { epoch } => (header.kind, header.epoch) = (kind::DETACH, epoch.0),
        Message::DetachAck { epoch } => (header.kind, header.epoch) = (kind::DETACH_ACK, epoch.0),
        Message::Write(r) => {
            header.kind = kind::WRITE;
            header.range(r);
        }
        Message::WriteZeroes { request, unmap } => {
            header.kind = kind::WRITE_ZEROES;
            header.range(request);
            header.set(FLAG_UNMAP, *unmap);
        }
        Message::Discard(r) => {
            header.kind = kind::DISCARD;
            header.range(r);
        }
        Message::Read(r) => {
            header.kind = kind::READ;
            header.range(r);
        }
        Message::Flush { epoch, seq } => {
            header.kind = kind::FLUSH;
            (header.epoch, header.seq) = (epoch.0, seq.0);
        }
        Message::AckVec {
            epoch,
            acks,
            log_pressure,
        } => {
            header.kind = kind::ACK_VEC;
            header.epoch = epoch.0;
            header.set(FLAG_LOG_PRESSURE, *log_pressure);
            body::put_acks(out, acks);
        }
        Message::ReadReply { seq, status } => {
            header.kind = kind::READ_REPLY;
            header.answer(*seq, *status);
        }
        Message::Heartbeat {
            epoch,
            sent,
            stable,
        } => {
            header.kind = kind::HEARTBEAT;
            (header.epoch, header.offset, header.seq) = (epoch.0, sent.0, stable.0);
        }
        Message::HeartbeatAck { epoch, sent } => {
            header.kind = kind::HEARTBEAT_ACK;
            (header.epoch, header.offset) = (epoch.0, sent.0);
        }
        Message::Nack(refusal) => {
            header.kind = kind::NACK;
            put_refusal(refusal, out);
        }
        Message::SyncBegin(c) => put_configuration(kind::SYNC_BEGIN, c, header, out),
        Message::SyncReady { disk, ticket } => {
            header.kind = kind::SYNC_READY;
            header.seq = *ticket;
            put_disk_state(disk, header, out);
        }
        Message::SyncBulk { epoch, ticket } => {
            header.kind = kind::SYNC_BULK;
            (header.epoch, header.seq) = (epoch.0, *ticket);
        }
        Message::MapRead {
            epoch,
            seq,
            copy,
            first,
            count,
        } => {
            assert!(
                *count <= MAP_CHUNKS,
                "one MapRead asks about at most {MAP_CHUNKS} chunks"
            );
            header.kind = kind::MAP_READ;
            (header.epoch, header.seq) = (epoch.0, seq.0);
            out.extend_from_slice(&copy.0);
            body::put_run(out, *first, *count);
        }
        Message::MapReply {
            seq,
            status,
            dirty,
            allocated,
        } => {
            header.kind = kind::MAP_REPLY;
            header.answer(*seq, *status);
            // Without a map there is no body.
            if *status == Status::Ok {
                body::put_words(out, dirty);
                body::put_words(out, allocated);
            }
        }
        Message::Mark {
            epoch,
            seq,
            copy,
            regions,
        } => {
            header.kind = kind::MARK;
            (header.epoch, header.seq) = (epoch.0, seq.0);
            header.set(FLAG_ALL, regions.is_none());
            out.extend_from_slice(&copy.0);
            if let Some(regions) = regions {
                body::put_regions(out, regions);
            }
        }
        Message::Clear { epoch, copy, runs } => {
            header.kind = kind::CLEAR;
            header.epoch = epoch.0;
            out.extend_from_slice(&copy.0);
            body::put_runs(out, runs);
        }
        Message::SyncHash(r) => {
            header.kind = kind::SYNC_HASH;
            header.range(r);
        }
        Message::SyncHashReply { seq, status, hash } => {
            header.kind = kind::SYNC_HASH_REPLY;
            header.answer(*seq, *status);
            if *status == Status::Ok {
                out.extend_from_slice(&hash.to_le_bytes());
            }
        }
        Message::SyncData(r) => {
            header.kind = kind::SYNC_DATA;
            header.range(r);
        }
        Message::SyncDone { epoch } => (header.kind, header.epoch) = (kind::SYNC_DONE, epoch.0),
        Message::SyncDoneAck { epoch } => {
            (header.kind, header.epoch) = (kind::SYNC_DONE_ACK, epoch.0);
        }
        Message::Grow { epoch, seq, size } => {
            header.kind = kind::GROW;
            (header.epoch, header.seq, header.offset) = (epoch.0, seq.0, *size);
        }
    }
}

fn put_disk_state(d: &DiskState, header: &mut Header, out: &mut Vec<u8>) {
    header.epoch = d.epoch.0;
    header.set(FLAG_PROBE, d.probe);
    header.set(FLAG_CLEAN, d.clean);
    header.set(FLAG_ALL, d.regions.is_none());
    out.extend_from_slice(&d.promised.0.to_le_bytes());
    out.extend_from_slice(&d.tag.0.to_le_bytes());
    out.extend_from_slice(&d.boot_id.0);
    if let Some(regions) = &d.regions {
        body::put_regions(out, regions);
    }
}

fn put_configuration(kind: u8, c: &Configuration, header: &mut Header, out: &mut Vec<u8>) {
    header.kind = kind;
    header.epoch = c.epoch.0;
    header.set(FLAG_LOGGED, c.logged);
    out.extend_from_slice(&c.tag.0.to_le_bytes());
    out.extend_from_slice(&c.size.to_le_bytes());
    body::put_absent(out, &c.absent);
}

fn put_refusal(refusal: &Refusal, out: &mut Vec<u8>) {
    match refusal {
        Refusal::Attached { node, heard_ms } => {
            out.push(1);
            out.extend_from_slice(&heard_ms.to_le_bytes());
            body::put_text(out, body::name(node));
        }
        Refusal::Stale { promised } => {
            out.push(2);
            out.extend_from_slice(&promised.0.to_le_bytes());
        }
        Refusal::UnknownCopy => out.push(3),
        Refusal::Inconsistent => out.push(4),
        Refusal::Failed => out.push(5),
        Refusal::Protocol(text) => {
            out.push(6);
            body::put_text(out, body::clip(text));
        }
        Refusal::NoRoom => out.push(7),
        Refusal::Busy => out.push(8),
    }
}

pub(super) fn read_message(header: &Header, body: &mut Reader<'_>) -> Result<Message, WireError> {
    let epoch = Epoch(header.epoch);
    let seq = Seq(header.seq);
    let sent = Nanos(header.offset);
    // Flags that a type does not have would be lost on the way through this program: refused.
    let flags = |known: u16| {
        if header.flags & !known == 0 {
            Ok(())
        } else {
            Err(WireError::Malformed("flags"))
        }
    };
    let (message, known) = match header.kind {
        kind::PROMISE => (Message::Promise(read_promise(header, body)?), FLAG_PROBE),
        kind::PROMISE_ACK => (
            Message::PromiseAck(read_disk_state(header, body)?),
            FLAG_PROBE | FLAG_CLEAN | FLAG_ALL,
        ),
        kind::ATTACH => (
            Message::Attach(read_configuration(header, body)?),
            FLAG_LOGGED,
        ),
        kind::EPOCH_CHANGE => (
            Message::EpochChange(read_configuration(header, body)?),
            FLAG_LOGGED,
        ),
        kind::ATTACH_ACK => (Message::AttachAck { epoch }, 0),
        kind::EPOCH_ACK => (Message::EpochAck { epoch }, 0),
        kind::DETACH => (Message::Detach { epoch }, 0),
        kind::DETACH_ACK => (Message::DetachAck { epoch }, 0),
        kind::WRITE => (Message::Write(header.request(IO_MAX)?), FLAG_FUA | FLAG_LZ4),
        kind::WRITE_ZEROES => {
            let (request, unmap) = (header.request(ZERO_MAX)?, header.flag(FLAG_UNMAP));
            (
                Message::WriteZeroes { request, unmap },
                FLAG_FUA | FLAG_UNMAP,
            )
        }
        kind::DISCARD => (Message::Discard(header.request(ZERO_MAX)?), FLAG_FUA),
        kind::READ => (Message::Read(header.request(IO_MAX)?), FLAG_FUA),
        kind::FLUSH => (Message::Flush { epoch, seq }, 0),
        kind::ACK_VEC => {
            let log_pressure = header.flag(FLAG_LOG_PRESSURE);
            (
                Message::AckVec {
                    epoch,
                    acks: body.acks()?,
                    log_pressure,
                },
                FLAG_LOG_PRESSURE,
            )
        }
        kind::READ_REPLY => {
            let status = header.answered()?;
            (Message::ReadReply { seq, status }, FLAG_LZ4)
        }
        kind::HEARTBEAT => (
            Message::Heartbeat {
                epoch,
                sent,
                stable: seq,
            },
            0,
        ),
        kind::HEARTBEAT_ACK => (Message::HeartbeatAck { epoch, sent }, 0),
        kind::NACK => (Message::Nack(read_refusal(body)?), 0),
        kind::SYNC_BEGIN => (
            Message::SyncBegin(read_configuration(header, body)?),
            FLAG_LOGGED,
        ),
        kind::SYNC_READY => {
            let (disk, ticket) = (read_disk_state(header, body)?, header.seq);
            let flags = FLAG_PROBE | FLAG_CLEAN | FLAG_ALL;
            (Message::SyncReady { disk, ticket }, flags)
        }
        kind::SYNC_BULK => {
            let ticket = header.seq;
            (Message::SyncBulk { epoch, ticket }, 0)
        }
        kind::MAP_READ => {
            let copy = CopyId(body.array()?);
            let (first, count) = body.run()?;
            within("number of chunks", count as usize, MAP_CHUNKS as usize)?;
            (
                Message::MapRead {
                    epoch,
                    seq,
                    copy,
                    first,
                    count,
                },
                0,
            )
        }
        kind::MAP_REPLY => {
            let status = header.answered()?;
            let (dirty, allocated) = if status == Status::Ok {
                (body.words()?, body.words()?)
            } else {
                (Vec::new(), Vec::new())
            };
            (
                Message::MapReply {
                    seq,
                    status,
                    dirty,
                    allocated,
                },
                0,
            )
        }
        kind::MARK => {
            let copy = CopyId(body.array()?);
            let regions = read_regions(header, body)?;
            (
                Message::Mark {
                    epoch,
                    seq,
                    copy,
                    regions,
                },
                FLAG_ALL,
            )
        }
        kind::CLEAR => {
            let (copy, runs) = (CopyId(body.array()?), body.runs()?);
            (Message::Clear { epoch, copy, runs }, 0)
        }
        kind::SYNC_HASH => (Message::SyncHash(header.request(IO_MAX)?), FLAG_FUA),
        kind::SYNC_HASH_REPLY => {
            let status = header.answered()?;
            let hash = if status == Status::Ok {
                body.u128()?
            } else {
                0
            };
            (Message::SyncHashReply { seq, status, hash }, 0)
        }
        kind::SYNC_DATA => (
            Message::SyncData(header.request(IO_MAX)?),
            FLAG_FUA | FLAG_LZ4,
        ),
        kind::SYNC_DONE => (Message::SyncDone { epoch }, 0),
        kind::SYNC_DONE_ACK => (Message::SyncDoneAck { epoch }, 0),
        kind::GROW => {
            let size = header.offset;
            (Message::Grow { epoch, seq, size }, 0)
        }
        other => return Err(WireError::Type(other)),
    };
    flags(known)?;
    Ok(message)
}

fn read_promise(header: &Header, body: &mut Reader<'_>) -> Result<Promise, WireError> {
    let (proof, released) = (body.u8()?, Epoch(body.u64()?));
    let proof = match proof {
        0 => Proof::None,
        1 => Proof::Released(released),
        2 => Proof::PredecessorDead,
        _ => return Err(WireError::Malformed("proof")),
    };
    Ok(Promise {
        epoch: Epoch(header.epoch),
        instance: Instance(body.array()?),
        candidate: NodeName(body.text()?),
        proof,
        probe: header.flag(FLAG_PROBE),
    })
}

fn read_disk_state(header: &Header, body: &mut Reader<'_>) -> Result<DiskState, WireError> {
    Ok(DiskState {
        promised: Epoch(body.u64()?),
        probe: header.flag(FLAG_PROBE),
        epoch: Epoch(header.epoch),
        tag: Tag(body.u64()?),
        boot_id: BootId(body.array()?),
        clean: header.flag(FLAG_CLEAN),
        regions: read_regions(header, body)?,
    })
}

/// Of an activity log; `None`: all.
fn read_regions(header: &Header, body: &mut Reader<'_>) -> Result<Option<Vec<Region>>, WireError> {
    (!header.flag(FLAG_ALL)).then(|| body.regions()).transpose()
}

fn read_configuration(header: &Header, body: &mut Reader<'_>) -> Result<Configuration, WireError> {
    Ok(Configuration {
        epoch: Epoch(header.epoch),
        tag: Tag(body.u64()?),
        size: body.u64()?,
        logged: header.flag(FLAG_LOGGED),
        absent: body.absent()?,
    })
}

fn read_refusal(body: &mut Reader<'_>) -> Result<Refusal, WireError> {
    match body.u8()? {
        1 => {
            let heard_ms = body.u64()?;
            Ok(Refusal::Attached {
                node: NodeName(body.text()?),
                heard_ms,
            })
        }
        2 => Ok(Refusal::Stale {
            promised: Epoch(body.u64()?),
        }),
        3 => Ok(Refusal::UnknownCopy),
        4 => Ok(Refusal::Inconsistent),
        5 => Ok(Refusal::Failed),
        6 => Ok(Refusal::Protocol(body.text()?)),
        7 => Ok(Refusal::NoRoom),
        8 => Ok(Refusal::Busy),
        _ => Err(WireError::Malformed("refusal")),
    }
}
