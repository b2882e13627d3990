//! The bytes themselves, and what happens to those that are not ours.

mod costs;
mod frame;
mod golden;
mod hello;
mod lz4;

use crate::replication::ids::{
    BootId, Chunk, CopyId, Epoch, Instance, Nanos, NodeName, Region, Seq, Span, Tag,
};
use crate::replication::message::{
    Absent, Configuration, DiskState, MAP_CHUNKS, Message, Promise, Proof, Refusal, Request, Status,
};

/// A payload of one sector.
const SECTOR: [u8; 512] = [0xd5; 512];

/// One message of each kind, two where a kind has shapes of its own, with the payload that goes with it.
fn messages() -> Vec<(Message, Option<&'static [u8]>)> {
    let epoch = Epoch(0x1112_1314_1516_1718);
    let seq = Seq(0x2122_2324_2526_2728);
    let request = Request {
        epoch,
        seq,
        span: Span {
            offset: 0x3132_3334_3536_3600,
            len: 512,
        },
        fua: false,
    };
    let configuration = Configuration {
        epoch,
        tag: Tag(0x4142_4344_4546_4748),
        size: 0x5152_5354_5556_5758,
        logged: true,
        absent: vec![Absent {
            copy_id: CopyId(*b"copy of the node"),
            last: Epoch(6),
            mirrored: true,
        }],
    };
    let node = || NodeName("n1".into());
    let promise = |proof, probe| Promise {
        epoch,
        candidate: node(),
        instance: Instance(*b"process instance"),
        proof,
        probe,
    };
    let plain = vec![
        Message::Promise(promise(Proof::None, true)),
        Message::Promise(promise(Proof::Released(Epoch(7)), false)),
        Message::Promise(promise(Proof::PredecessorDead, false)),
        Message::PromiseAck(disk_state(epoch)),
        Message::Attach(configuration.clone()),
        Message::AttachAck { epoch },
        Message::EpochChange(Configuration {
            logged: false,
            absent: vec![],
            ..configuration.clone()
        }),
        Message::EpochAck { epoch },
        Message::WriteZeroes {
            request: Request {
                fua: true,
                ..request
            },
            unmap: true,
        },
        Message::WriteZeroes {
            request,
            unmap: false,
        },
        Message::Discard(request),
        Message::Flush { epoch, seq },
        Message::AckVec {
            epoch,
            acks: vec![
                (Seq(1), Status::Ok),
                (Seq(2), Status::Io),
                (Seq(3), Status::NoSpace),
                (seq, Status::Stale),
            ],
            log_pressure: true,
        },
        Message::Read(request),
        Message::ReadReply {
            seq,
            status: Status::NoSpace,
        },
        Message::Heartbeat {
            epoch,
            sent: Nanos(0x6162_6364_6566_6768),
            stable: seq,
        },
        Message::HeartbeatAck {
            epoch,
            sent: Nanos(0x6162_6364_6566_6768),
        },
        Message::Detach { epoch },
        Message::DetachAck { epoch },
        Message::Nack(Refusal::Attached {
            node: node(),
            heard_ms: 1234,
        }),
        Message::Nack(Refusal::Stale { promised: epoch }),
        Message::Nack(Refusal::UnknownCopy),
        Message::Nack(Refusal::Inconsistent),
        Message::Nack(Refusal::Failed),
        Message::Nack(Refusal::Protocol("why".into())),
    ];
    let with_payload = [
        Message::Write(Request {
            fua: true,
            ..request
        }),
        Message::Write(request),
        Message::ReadReply {
            seq,
            status: Status::Ok,
        },
    ];
    let size = configuration.size;
    let resync = resync_messages(request, configuration);
    let bare = |m| (m, None);
    plain
        .into_iter()
        .map(bare)
        .chain(with_payload.into_iter().map(|m| (m, Some(&SECTOR[..]))))
        .chain(resync.into_iter().map(bare))
        .chain([(Message::SyncData(request), Some(&SECTOR[..]))])
        .chain(
            [
                Message::Grow { epoch, seq, size },
                Message::Nack(Refusal::NoRoom),
                Message::Nack(Refusal::Busy),
            ]
            .map(bare),
        )
        .collect()
}

fn resync_messages(request: Request, configuration: Configuration) -> Vec<Message> {
    let Request { epoch, seq, .. } = request;
    let copy = CopyId(*b"copy of the node");
    let ticket = 0x7172_7374_7576_7778;
    vec![
        Message::SyncBegin(configuration),
        Message::SyncReady {
            disk: disk_state(epoch),
            ticket,
        },
        Message::SyncBulk { epoch, ticket },
        Message::MapRead {
            epoch,
            seq,
            copy,
            first: Chunk(0x0a0b_0c0d),
            count: MAP_CHUNKS,
        },
        Message::MapReply {
            seq,
            status: Status::Ok,
            dirty: vec![0x8182_8384_8586_8788],
            allocated: vec![1, 0x9192_9394_9596_9798],
        },
        Message::MapReply {
            seq,
            status: Status::Io,
            dirty: vec![],
            allocated: vec![],
        },
        Message::Mark {
            epoch,
            seq,
            copy,
            regions: Some(vec![Region(1), Region(0x0a0b_0c0d)]),
        },
        Message::Mark {
            epoch,
            seq,
            copy,
            regions: None,
        },
        Message::Clear {
            epoch,
            copy,
            runs: vec![(Chunk(0), 1), (Chunk(0x0a0b_0c0d), 0x0e0f)],
        },
        Message::SyncHash(request),
        Message::SyncHashReply {
            seq,
            status: Status::Ok,
            hash: 0xb0b1_b2b3_b4b5_b6b7_b8b9_babb_bcbd_bebf,
        },
        Message::SyncHashReply {
            seq,
            status: Status::Stale,
            hash: 0,
        },
        Message::SyncDone { epoch },
        Message::SyncDoneAck { epoch },
    ]
}

fn disk_state(epoch: Epoch) -> DiskState {
    DiskState {
        promised: Epoch(8),
        probe: false,
        epoch,
        tag: Tag(9),
        boot_id: BootId(*b"boot of a kernel"),
        clean: true,
        regions: Some(vec![Region(1), Region(0x0a0b_0c0d)]),
    }
}
