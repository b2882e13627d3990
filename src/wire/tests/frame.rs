use proptest::prelude::*;

use super::messages;
use crate::replication::ids::{
    BootId, COPIES_MAX, Chunk, CopyId, Epoch, IO_MAX, Instance, Nanos, NodeName, REGIONS_MAX,
    Region, Seq, Span, Tag, ZERO_MAX,
};
use crate::replication::message::{
    Absent, Configuration, DiskState, MAP_CHUNKS, Message, Promise, Proof, RUNS_MAX, Refusal,
    Request, Status,
};
use crate::wire::WireError;
use crate::wire::frame::{
    ACKS_MAX, BODY_MAX, FRAME_MAX, HEADER, Payload, TEXT_MAX, WORDS_MAX, decode, encode, needed,
};

/// The frame as it travels, payload included.
fn frame(message: &Message, handle: u32, payload: Option<Payload<'_>>) -> Vec<u8> {
    let mut out = Vec::new();
    encode(message, handle, payload, &mut out);
    out.extend_from_slice(payload.map_or(&[], |p| p.bytes));
    out
}

fn raw(bytes: &[u8]) -> Payload<'_> {
    Payload {
        raw_len: bytes.len() as u32,
        bytes,
        lz4: false,
    }
}

fn write(len: u32) -> Message {
    Message::Write(Request {
        epoch: Epoch(1),
        seq: Seq(2),
        span: Span { offset: 512, len },
        fua: false,
    })
}

fn sync_data(len: u32) -> Message {
    let Message::Write(request) = write(len) else {
        unreachable!("a write is one")
    };
    Message::SyncData(request)
}

/// Changes a header's bytes and makes its CRC right again.
fn forge(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    let crc = crc32c::crc32c(&frame[..60]);
    frame[60..64].copy_from_slice(&crc.to_le_bytes());
}

/// Changes a body's bytes and makes both CRCs right again.
fn forge_body(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame[HEADER + at..HEADER + at + bytes.len()].copy_from_slice(bytes);
    let len = u32::from_le_bytes(frame[12..16].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c(&frame[HEADER..HEADER + len]);
    forge(frame, 52, &crc.to_le_bytes());
}

fn arb_request(len_max: u32) -> impl Strategy<Value = Request> {
    (
        any::<u64>(),
        any::<u64>(),
        0u64..1 << 40,
        1..=len_max / 512,
        any::<bool>(),
    )
        .prop_map(|(epoch, seq, at, n, fua)| {
            let span = Span {
                offset: at * 512,
                len: n * 512,
            };
            Request {
                epoch: Epoch(epoch),
                seq: Seq(seq),
                span,
                fua,
            }
        })
}

fn arb_status() -> impl Strategy<Value = Status> {
    prop::sample::select(vec![Status::Ok, Status::Io, Status::NoSpace, Status::Stale])
}

fn arb_name() -> impl Strategy<Value = NodeName> {
    "[a-zé-ü0-9.-]{0,128}".prop_map(NodeName)
}

fn arb_configuration() -> impl Strategy<Value = Configuration> {
    let missing = prop::collection::vec((any::<[u8; 16]>(), any::<u64>()), 0..=COPIES_MAX);
    (
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<bool>(),
        missing,
    )
        .prop_map(|(epoch, tag, size, logged, absent)| {
            let absent = absent
                .into_iter()
                .map(|(c, e)| Absent {
                    copy_id: CopyId(c),
                    last: Epoch(e),
                    mirrored: e % 2 == 1,
                })
                .collect();
            Configuration {
                epoch: Epoch(epoch),
                tag: Tag(tag),
                size,
                logged,
                absent,
            }
        })
}

fn arb_refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        (arb_name(), any::<u64>())
            .prop_map(|(node, heard_ms)| Refusal::Attached { node, heard_ms }),
        any::<u64>().prop_map(|p| Refusal::Stale { promised: Epoch(p) }),
        Just(Refusal::UnknownCopy),
        Just(Refusal::Inconsistent),
        Just(Refusal::Failed),
        Just(Refusal::NoRoom),
        Just(Refusal::Busy),
        "\\PC{0,64}".prop_map(Refusal::Protocol),
    ]
}

fn arb_promise() -> impl Strategy<Value = Promise> {
    let proof = prop_oneof![
        Just(Proof::None),
        any::<u64>().prop_map(|e| Proof::Released(Epoch(e))),
        Just(Proof::PredecessorDead)
    ];
    (
        any::<u64>(),
        arb_name(),
        any::<[u8; 16]>(),
        proof,
        any::<bool>(),
    )
        .prop_map(|(epoch, candidate, id, proof, probe)| Promise {
            epoch: Epoch(epoch),
            candidate,
            instance: Instance(id),
            proof,
            probe,
        })
}

fn arb_disk_state() -> impl Strategy<Value = DiskState> {
    let numbers = (any::<u64>(), any::<u64>(), any::<u64>());
    let regions = prop::collection::vec(any::<u32>().prop_map(Region), 0..200);
    let regions = prop::option::of(regions);
    (
        numbers,
        any::<[u8; 16]>(),
        any::<bool>(),
        any::<bool>(),
        regions,
    )
        .prop_map(
            |((promised, epoch, tag), boot, probe, clean, regions)| DiskState {
                promised: Epoch(promised),
                probe,
                epoch: Epoch(epoch),
                tag: Tag(tag),
                boot_id: BootId(boot),
                clean,
                regions,
            },
        )
}

fn arb_message() -> impl Strategy<Value = Message> {
    let epoch = || any::<u64>().prop_map(Epoch);
    let acks = prop::collection::vec((any::<u64>().prop_map(Seq), arb_status()), 0..100);
    prop_oneof![
        arb_promise().prop_map(Message::Promise),
        arb_disk_state().prop_map(Message::PromiseAck),
        arb_configuration().prop_map(Message::Attach),
        arb_configuration().prop_map(Message::EpochChange),
        epoch().prop_map(|epoch| Message::AttachAck { epoch }),
        epoch().prop_map(|epoch| Message::EpochAck { epoch }),
        epoch().prop_map(|epoch| Message::Detach { epoch }),
        epoch().prop_map(|epoch| Message::DetachAck { epoch }),
        arb_request(8192).prop_map(Message::Write),
        (arb_request(ZERO_MAX), any::<bool>())
            .prop_map(|(request, unmap)| Message::WriteZeroes { request, unmap }),
        arb_request(ZERO_MAX).prop_map(Message::Discard),
        arb_request(IO_MAX).prop_map(Message::Read),
        (epoch(), any::<u64>()).prop_map(|(epoch, seq)| Message::Flush {
            epoch,
            seq: Seq(seq)
        }),
        (epoch(), acks, any::<bool>()).prop_map(|(epoch, acks, log_pressure)| Message::AckVec {
            epoch,
            acks,
            log_pressure
        }),
        (any::<u64>(), arb_status()).prop_map(|(seq, status)| Message::ReadReply {
            seq: Seq(seq),
            status
        }),
        (epoch(), any::<u64>(), any::<u64>()).prop_map(|(epoch, sent, stable)| {
            Message::Heartbeat {
                epoch,
                sent: Nanos(sent),
                stable: Seq(stable),
            }
        }),
        (epoch(), any::<u64>()).prop_map(|(epoch, sent)| Message::HeartbeatAck {
            epoch,
            sent: Nanos(sent)
        }),
        arb_refusal().prop_map(Message::Nack),
        (epoch(), any::<u64>(), any::<u64>()).prop_map(|(epoch, seq, size)| Message::Grow {
            epoch,
            seq: Seq(seq),
            size
        }),
        arb_resync(),
    ]
}

fn arb_run(count_max: u32) -> impl Strategy<Value = (Chunk, u32)> {
    (any::<u32>(), 1..=count_max).prop_map(|(first, count)| {
        let first = first.min(u32::MAX - count);
        (Chunk(first), count)
    })
}

fn arb_resync() -> impl Strategy<Value = Message> {
    let epoch = || any::<u64>().prop_map(Epoch);
    let seq = || any::<u64>().prop_map(Seq);
    let copy = || any::<[u8; 16]>().prop_map(CopyId);
    let words = || prop::collection::vec(any::<u64>(), 0..100);
    let regions = prop::collection::vec(any::<u32>().prop_map(Region), 0..100);
    let runs = prop::collection::vec(arb_run(u32::MAX), 0..100);
    prop_oneof![
        arb_configuration().prop_map(Message::SyncBegin),
        (arb_disk_state(), any::<u64>())
            .prop_map(|(disk, ticket)| Message::SyncReady { disk, ticket }),
        (epoch(), any::<u64>()).prop_map(|(epoch, ticket)| Message::SyncBulk { epoch, ticket }),
        (epoch(), seq(), copy(), arb_run(MAP_CHUNKS)).prop_map(
            |(epoch, seq, copy, (first, count))| Message::MapRead {
                epoch,
                seq,
                copy,
                first,
                count
            }
        ),
        (seq(), arb_status(), words(), words()).prop_map(|(seq, status, dirty, allocated)| {
            let maps = |words| {
                if status == Status::Ok {
                    words
                } else {
                    Vec::new()
                }
            };
            Message::MapReply {
                seq,
                status,
                dirty: maps(dirty),
                allocated: maps(allocated),
            }
        }),
        (epoch(), seq(), copy(), prop::option::of(regions)).prop_map(
            |(epoch, seq, copy, regions)| Message::Mark {
                epoch,
                seq,
                copy,
                regions
            }
        ),
        (epoch(), copy(), runs).prop_map(|(epoch, copy, runs)| Message::Clear {
            epoch,
            copy,
            runs
        }),
        arb_request(IO_MAX).prop_map(Message::SyncHash),
        (seq(), arb_status(), any::<[u8; 16]>()).prop_map(|(seq, status, hash)| {
            let hash = if status == Status::Ok {
                u128::from_le_bytes(hash)
            } else {
                0
            };
            Message::SyncHashReply { seq, status, hash }
        }),
        arb_request(8192).prop_map(Message::SyncData),
        epoch().prop_map(|epoch| Message::SyncDone { epoch }),
        epoch().prop_map(|epoch| Message::SyncDoneAck { epoch }),
    ]
}

/// A payload that goes with `message`: its raw length and its bytes.
fn payload_for(message: &Message, lz4: bool) -> Option<(u32, Vec<u8>)> {
    let raw_len = match message {
        Message::Write(r) | Message::SyncData(r) => r.span.len,
        Message::ReadReply {
            status: Status::Ok, ..
        } => 4096,
        _ => return None,
    };
    Some((
        raw_len,
        vec![
            0x5a;
            if lz4 {
                raw_len as usize / 3
            } else {
                raw_len as usize
            }
        ],
    ))
}

#[test]
fn a_stream_of_frames_comes_apart_again() {
    let mut stream = Vec::new();
    for (message, payload) in messages() {
        stream.extend(frame(&message, 7, payload.map(raw)));
    }
    let mut rest = &stream[..];
    for (message, payload) in messages() {
        let (found, used) = decode(rest).unwrap().unwrap();
        assert_eq!(
            (found.handle, found.message, found.payload.map(|p| p.bytes)),
            (7, message, payload)
        );
        assert_eq!(needed(rest), Ok(used));
        rest = &rest[used..];
    }
    assert!(rest.is_empty());
}

#[test]
fn encoding_appends_behind_what_is_there() {
    let mut out = vec![1, 2, 3];
    encode(&Message::Detach { epoch: Epoch(9) }, 5, None, &mut out);
    assert_eq!(out[..3], [1, 2, 3]);
    assert_eq!(
        decode(&out[3..]).unwrap().unwrap().0.message,
        Message::Detach { epoch: Epoch(9) }
    );
}

#[test]
fn the_largest_of_everything_fits() {
    let region = |n| Region(n as u32);
    let state = DiskState {
        promised: Epoch(1),
        probe: false,
        epoch: Epoch(1),
        tag: Tag(1),
        boot_id: BootId([1; 16]),
        clean: true,
        regions: Some((0..REGIONS_MAX).map(region).collect()),
    };
    let acks = vec![(Seq(u64::MAX), Status::Stale); ACKS_MAX];
    let data = vec![3; IO_MAX as usize];
    let words = || vec![u64::MAX; WORDS_MAX];
    let copy = CopyId([7; 16]);
    for (message, payload) in [
        (Message::PromiseAck(state.clone()), None),
        (
            Message::Mark {
                epoch: Epoch(1),
                seq: Seq(1),
                copy,
                regions: state.regions.clone(),
            },
            None,
        ),
        (
            Message::SyncReady {
                disk: state,
                ticket: u64::MAX,
            },
            None,
        ),
        (
            Message::MapRead {
                epoch: Epoch(1),
                seq: Seq(1),
                copy,
                first: Chunk(u32::MAX - MAP_CHUNKS),
                count: MAP_CHUNKS,
            },
            None,
        ),
        (
            Message::MapReply {
                seq: Seq(1),
                status: Status::Ok,
                dirty: words(),
                allocated: words(),
            },
            None,
        ),
        (
            Message::Clear {
                epoch: Epoch(1),
                copy,
                runs: vec![(Chunk(0), u32::MAX); RUNS_MAX],
            },
            None,
        ),
        (sync_data(IO_MAX), Some(raw(&data))),
        (
            Message::AckVec {
                epoch: Epoch(1),
                acks,
                log_pressure: true,
            },
            None,
        ),
        (write(IO_MAX), Some(raw(&data))),
        (
            Message::ReadReply {
                seq: Seq(1),
                status: Status::Ok,
            },
            Some(raw(&data)),
        ),
    ] {
        let bytes = frame(&message, 1, payload);
        assert!(bytes.len() <= FRAME_MAX);
        assert_eq!(decode(&bytes).unwrap().unwrap().0.message, message);
    }
}

#[test]
fn a_refusals_text_is_clipped_between_characters() {
    let text = "é".repeat(TEXT_MAX);
    let bytes = frame(
        &Message::Nack(Refusal::Protocol(format!("x{text}"))),
        1,
        None,
    );
    let Message::Nack(Refusal::Protocol(found)) = decode(&bytes).unwrap().unwrap().0.message else {
        panic!()
    };
    assert_eq!(found.len(), TEXT_MAX - 1);
    assert!(found.starts_with("xé") && text.starts_with(&found[1..]));
}

#[test]
fn lengths_beyond_their_limits_are_refused_from_the_header_alone() {
    for message in [write(512), sync_data(512)] {
        lengths_are_refused_from_the_header(&message);
    }
}

fn lengths_are_refused_from_the_header(message: &Message) {
    let bytes = |at: usize, value: u32| {
        let mut f = frame(message, 1, Some(raw(&[1; 512])));
        forge(&mut f, at, &value.to_le_bytes());
        f.truncate(HEADER);
        f
    };
    for (at, value) in [
        (12, BODY_MAX as u32 + 1),
        (12, u32::MAX),
        (40, IO_MAX + 512),
        (40, u32::MAX),
    ] {
        let hostile = bytes(at, value);
        assert!(
            matches!(needed(&hostile), Err(WireError::TooLong { .. })),
            "{at} {value}"
        );
        assert!(matches!(decode(&hostile), Err(WireError::TooLong { .. })));
    }
    for (at, value) in [(44, 0), (44, 511), (44, 513), (44, u32::MAX), (40, 0)] {
        assert!(
            matches!(needed(&bytes(at, value)), Err(WireError::Malformed(_))),
            "{at} {value}"
        );
    }
    // lz4 that does not shrink, and a payload where there is none.
    let mut f = bytes(0, u32::from_le_bytes(*b"LSF\0"));
    forge(&mut f, 6, &1u16.to_le_bytes());
    assert!(matches!(needed(&f), Err(WireError::Malformed(_))));
    let mut f = frame(&Message::Detach { epoch: Epoch(1) }, 1, None);
    forge(&mut f, 44, &1u32.to_le_bytes());
    assert!(matches!(needed(&f), Err(WireError::Malformed(_))));
}

#[test]
fn counts_and_codes_out_of_range_are_refused() {
    let config = Configuration {
        epoch: Epoch(1),
        tag: Tag(1),
        size: 1,
        logged: true,
        absent: vec![],
    };
    let promise = Promise {
        epoch: Epoch(1),
        candidate: NodeName("n1".into()),
        instance: Instance([0; 16]),
        proof: Proof::None,
        probe: false,
    };
    let acks = Message::AckVec {
        epoch: Epoch(1),
        acks: vec![(Seq(1), Status::Ok)],
        log_pressure: false,
    };
    let map_read = Message::MapRead {
        epoch: Epoch(1),
        seq: Seq(1),
        copy: CopyId([1; 16]),
        first: Chunk(7),
        count: 1,
    };
    let map_reply = Message::MapReply {
        seq: Seq(1),
        status: Status::Ok,
        dirty: vec![],
        allocated: vec![1],
    };
    let mark = Message::Mark {
        epoch: Epoch(1),
        seq: Seq(1),
        copy: CopyId([1; 16]),
        regions: Some(vec![Region(1)]),
    };
    let clear = Message::Clear {
        epoch: Epoch(1),
        copy: CopyId([1; 16]),
        runs: vec![(Chunk(7), 1)],
    };
    let long = [9, 0, 1];
    let cases: [(Message, usize, &[u8]); 20] = [
        (map_read.clone(), 20, &0u32.to_le_bytes()),
        (map_read.clone(), 20, &(MAP_CHUNKS + 1).to_le_bytes()),
        (map_read.clone(), 20, &u32::MAX.to_le_bytes()),
        (map_read, 16, &u32::MAX.to_le_bytes()),
        (map_reply.clone(), 0, &(WORDS_MAX as u32 + 1).to_le_bytes()),
        (map_reply.clone(), 4, &2u32.to_le_bytes()),
        (map_reply, 4, &0u32.to_le_bytes()),
        (mark, 16, &(REGIONS_MAX as u32 + 1).to_le_bytes()),
        (clear.clone(), 16, &(RUNS_MAX as u32 + 1).to_le_bytes()),
        (clear.clone(), 24, &0u32.to_le_bytes()),
        (clear.clone(), 24, &(u32::MAX - 6).to_le_bytes()),
        (clear, 20, &u32::MAX.to_le_bytes()),
        (acks.clone(), 0, &(ACKS_MAX as u32 + 1).to_le_bytes()),
        (acks.clone(), 0, &2u32.to_le_bytes()),
        (acks.clone(), 0, &0u32.to_le_bytes()),
        (acks, 12, &[4]),
        (
            Message::Attach(config),
            16,
            &(COPIES_MAX as u32 + 1).to_le_bytes(),
        ),
        (Message::Promise(promise.clone()), 0, &[3]),
        (Message::Promise(promise), 25, &long[1..]),
        (Message::Nack(Refusal::Failed), 0, &[9]),
    ];
    for (message, at, bytes) in cases {
        let mut f = frame(&message, 1, None);
        forge_body(&mut f, at, bytes);
        let e = decode(&f).unwrap_err();
        assert!(
            matches!(e, WireError::Malformed(_) | WireError::TooLong { .. }),
            "{message:?} {at}: {e}"
        );
    }
}

#[test]
fn lists_with_one_entry_too_many_are_refused_even_if_it_is_there() {
    let one = Absent {
        copy_id: CopyId([1; 16]),
        last: Epoch(1),
        mirrored: false,
    };
    let absent = vec![one; COPIES_MAX];
    let config = Configuration {
        epoch: Epoch(1),
        tag: Tag(1),
        size: 1,
        logged: true,
        absent,
    };
    let acks = vec![(Seq(1), Status::Ok); ACKS_MAX];
    let cases = [
        (Message::EpochChange(config), 16, COPIES_MAX as u32, 25),
        (
            Message::AckVec {
                epoch: Epoch(1),
                acks,
                log_pressure: false,
            },
            0,
            ACKS_MAX as u32,
            9,
        ),
        (
            Message::MapReply {
                seq: Seq(1),
                status: Status::Ok,
                dirty: vec![],
                allocated: vec![1; WORDS_MAX],
            },
            4,
            WORDS_MAX as u32,
            8,
        ),
        (
            Message::Mark {
                epoch: Epoch(1),
                seq: Seq(1),
                copy: CopyId([1; 16]),
                regions: Some(vec![Region(1); REGIONS_MAX]),
            },
            16,
            REGIONS_MAX as u32,
            4,
        ),
        (
            Message::Clear {
                epoch: Epoch(1),
                copy: CopyId([1; 16]),
                runs: vec![(Chunk(1), 1); RUNS_MAX],
            },
            16,
            RUNS_MAX as u32,
            8,
        ),
    ];
    for (message, at, count, len) in cases {
        let mut f = frame(&message, 1, None);
        f.extend(vec![0; len]);
        let body_len = (f.len() - HEADER) as u32;
        forge(&mut f, 12, &body_len.to_le_bytes());
        forge_body(&mut f, at, &(count + 1).to_le_bytes());
        assert!(matches!(decode(&f), Err(WireError::TooLong { .. })));
    }
}

#[test]
fn ranges_that_are_not_of_whole_sectors_or_overflow_are_refused() {
    let discard = Message::Discard(Request {
        epoch: Epoch(1),
        seq: Seq(1),
        span: Span {
            offset: 0,
            len: 512,
        },
        fua: false,
    });
    let cases: [(usize, &[u8]); 5] = [
        (32, &1u64.to_le_bytes()),
        (32, &(u64::MAX - 511).to_le_bytes()),
        (32, &u64::MAX.to_le_bytes()),
        (40, &0u32.to_le_bytes()),
        (40, &513u32.to_le_bytes()),
    ];
    for (at, bytes) in cases {
        let mut f = frame(&discard, 1, None);
        forge(&mut f, at, bytes);
        assert!(
            matches!(decode(&f), Err(WireError::Malformed(_))),
            "{at} {bytes:?}"
        );
    }
    let Message::Discard(request) = discard else {
        unreachable!("it was made as one")
    };
    for message in [Message::Read(request), Message::SyncHash(request)] {
        let mut f = frame(&message, 1, None);
        forge(&mut f, 40, &(IO_MAX + 512).to_le_bytes());
        assert!(matches!(decode(&f), Err(WireError::TooLong { .. })));
    }
    let zeroes = Message::WriteZeroes {
        request,
        unmap: true,
    };
    for message in [zeroes, Message::Discard(request)] {
        let mut f = frame(&message, 1, None);
        forge(&mut f, 40, &ZERO_MAX.to_le_bytes());
        assert!(decode(&f).is_ok());
        for longer in [ZERO_MAX + 512, u32::MAX - 511] {
            forge(&mut f, 40, &longer.to_le_bytes());
            assert!(matches!(decode(&f), Err(WireError::TooLong { .. })));
        }
    }
}

#[test]
fn unknown_types_flags_versions_and_statuses_are_refused() {
    let detach = || frame(&Message::Detach { epoch: Epoch(1) }, 1, None);
    for kind in [0, 32, 255] {
        let mut f = detach();
        forge(&mut f, 5, &[kind]);
        assert_eq!(decode(&f), Err(WireError::Type(kind)));
    }
    let mut f = detach();
    forge(&mut f, 6, &2u16.to_le_bytes());
    assert_eq!(decode(&f), Err(WireError::Malformed("flags")));
    let mut f = detach();
    forge(&mut f, 4, &[2]);
    assert!(matches!(
        decode(&f),
        Err(WireError::FrameVersion { found: 2, .. })
    ));
    let (seq, failed) = (Seq(1), Status::Io);
    for message in [
        Message::ReadReply {
            seq,
            status: failed,
        },
        Message::SyncHashReply {
            seq,
            status: failed,
            hash: 0,
        },
        Message::MapReply {
            seq,
            status: failed,
            dirty: vec![],
            allocated: vec![],
        },
    ] {
        for status in [4u32, 256] {
            let mut f = frame(&message, 1, None);
            forge(&mut f, 56, &status.to_le_bytes());
            assert_eq!(decode(&f), Err(WireError::Malformed("status")));
        }
    }
    assert_eq!(needed(b"GET "), Err(WireError::Magic(*b"GET ")));
    assert_eq!(decode(b"H"), Err(WireError::Magic(*b"H\0\0\0")));
}

/// What only an answer that is `Ok` brings is not there otherwise, and has to be there then.
#[test]
fn an_answer_has_a_body_only_if_it_went_well() {
    let (seq, hash) = (Seq(1), 7);
    let hashed = |status| Message::SyncHashReply { seq, status, hash };
    let mapped = |status| Message::MapReply {
        seq,
        status,
        dirty: vec![1],
        allocated: vec![2],
    };
    for (fine, failed) in [
        (hashed(Status::Ok), hashed(Status::Io)),
        (mapped(Status::Ok), mapped(Status::Io)),
    ] {
        let mut f = frame(&fine, 1, None);
        forge(&mut f, 56, &1u32.to_le_bytes());
        assert!(matches!(decode(&f), Err(WireError::Malformed(_))));
        let mut f = frame(&failed, 1, None);
        assert_eq!(f.len(), HEADER);
        forge(&mut f, 56, &0u32.to_le_bytes());
        assert!(matches!(decode(&f), Err(WireError::Malformed(_))));
    }
}

/// Marking all regions is told from marking a list by a flag: neither may carry the other's body.
#[test]
fn a_mark_names_its_regions_or_is_for_all() {
    let mark = |regions| Message::Mark {
        epoch: Epoch(1),
        seq: Seq(1),
        copy: CopyId([1; 16]),
        regions,
    };
    let mut all = frame(&mark(None), 1, None);
    forge(&mut all, 6, &0u16.to_le_bytes());
    assert!(matches!(decode(&all), Err(WireError::Malformed(_))));
    let mut none = frame(&mark(Some(vec![])), 1, None);
    forge(&mut none, 6, &(1u16 << 7).to_le_bytes());
    assert!(matches!(decode(&none), Err(WireError::Malformed(_))));
}

#[test]
#[should_panic(expected = "within its limits")]
fn a_write_without_its_payload_is_the_callers_mistake() {
    encode(&write(512), 1, None, &mut Vec::new());
}

#[test]
#[should_panic(expected = "fills its range")]
fn a_payload_of_another_length_than_its_range_is_the_callers_mistake() {
    encode(&write(1024), 1, Some(raw(&[0; 512])), &mut Vec::new());
}

#[test]
#[should_panic(expected = "fills its range")]
fn so_it_is_for_a_chunk() {
    encode(&sync_data(1024), 1, Some(raw(&[0; 512])), &mut Vec::new());
}

#[test]
#[should_panic(expected = "a run has chunks")]
fn a_run_of_no_chunks_is_the_callers_mistake() {
    let clear = Message::Clear {
        epoch: Epoch(1),
        copy: CopyId([1; 16]),
        runs: vec![(Chunk(1), 0)],
    };
    encode(&clear, 1, None, &mut Vec::new());
}

proptest! {
    #[test]
    fn every_message_comes_back(message in arb_message(), handle in any::<u32>(), lz4 in any::<bool>()) {
        let payload = payload_for(&message, lz4);
        let sent = payload.as_ref().map(|(raw_len, bytes)| Payload { raw_len: *raw_len, bytes, lz4 });
        let bytes = frame(&message, handle, sent);
        let (found, used) = decode(&bytes).unwrap().unwrap();
        prop_assert_eq!(used, bytes.len());
        prop_assert_eq!(needed(&bytes[..HEADER]), Ok(used));
        prop_assert_eq!((found.handle, found.message), (handle, message));
        prop_assert_eq!(found.payload.map(|p| (p.raw_len, p.bytes.to_vec())), payload);
        prop_assert!(found.payload.is_none_or(|p| p.lz4 == lz4));
    }

    /// Cut anywhere, a frame asks for more, and never for more than it has.
    #[test]
    fn a_frame_cut_short_asks_for_more(message in arb_message()) {
        let payload = payload_for(&message, false);
        let bytes = frame(&message, 1, payload.as_ref().map(|(_, b)| raw(b)));
        for cut in 0..bytes.len() {
            prop_assert_eq!(decode(&bytes[..cut]), Ok(None));
            let more = needed(&bytes[..cut]).unwrap();
            prop_assert!(more > cut && more <= bytes.len());
        }
    }

    /// One flipped bit anywhere is an error, and not a wait.
    #[test]
    fn a_flipped_bit_is_an_error(message in arb_message(), bit in any::<prop::sample::Index>()) {
        let payload = payload_for(&message, false);
        let mut bytes = frame(&message, 1, payload.as_ref().map(|(_, b)| raw(b)));
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode(&bytes).is_err());
    }

    /// Noise behind a good header start, with right CRCs, is an error, a wait or a message; never a panic, never a wait for more
    /// than the longest frame.
    #[test]
    fn hostile_headers_are_bounded(fields in prop::collection::vec(any::<u8>(), 55), kind in 0u8..32, body in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut bytes = b"LSF\0\x01".to_vec();
        bytes.extend(&fields);
        bytes[5] = kind;
        // Small lengths now and then, so that bodies are read too.
        if fields[50] % 2 == 0 {
            bytes[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
            bytes[44..48].fill(0);
            bytes[48..52].fill(0);
            let crc = if body.is_empty() { 0 } else { crc32c::crc32c(&body) };
            bytes[52..56].copy_from_slice(&crc.to_le_bytes());
            bytes[6..8].fill(0);
        }
        let crc = crc32c::crc32c(&bytes);
        bytes.extend(crc.to_le_bytes());
        bytes.extend(&body);
        if let Ok(n) = needed(&bytes) {
            prop_assert!(n <= FRAME_MAX);
        }
        let _ = decode(&bytes);
    }

    #[test]
    fn noise_is_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = (needed(&bytes), decode(&bytes));
    }
}
