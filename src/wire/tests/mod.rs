//! The bytes themselves, and what happens to those that are not ours.

mod costs;
mod frame;
mod golden;
mod hello;
mod lz4;

use crate::replication::ids::{
    BootId, CopyId, Epoch, Instance, Nanos, NodeName, Region, Seq, Span, Tag,
};
use crate::replication::message::{
    Absent, Configuration, DiskState, Message, Promise, Proof, Refusal, Request, Status,
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
        Message::PromiseAck(DiskState {
            promised: Epoch(8),
            probe: false,
            epoch,
            tag: Tag(9),
            boot_id: BootId(*b"boot of a kernel"),
            clean: true,
            regions: vec![Region(1), Region(0x0a0b_0c0d)],
        }),
        Message::Attach(configuration.clone()),
        Message::AttachAck { epoch },
        Message::EpochChange(Configuration {
            logged: false,
            absent: vec![],
            ..configuration
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
    let plain = plain.into_iter().map(|m| (m, None));
    plain
        .chain(with_payload.into_iter().map(|m| (m, Some(&SECTOR[..]))))
        .collect()
}
