use proptest::prelude::*;

use super::messages;
use crate::replication::ids::{
    BootId, COPIES_MAX, CopyId, Epoch, IO_MAX, Instance, Nanos, NodeName, REGIONS_MAX, Region, Seq,
    Span, Tag,
};
use crate::replication::message::{
    Absent, Configuration, DiskState, Message, Promise, Proof, Refusal, Request, Status,
};
use crate::wire::WireError;
use crate::wire::frame::{
    ACKS_MAX, BODY_MAX, FRAME_MAX, HEADER, Payload, TEXT_MAX, decode, encode, needed,
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
        (arb_request(u32::MAX), any::<bool>())
            .prop_map(|(request, unmap)| Message::WriteZeroes { request, unmap }),
        arb_request(u32::MAX).prop_map(Message::Discard),
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
    ]
}

/// A payload that goes with `message`: its raw length and its bytes.
fn payload_for(message: &Message, lz4: bool) -> Option<(u32, Vec<u8>)> {
    let raw_len = match message {
        Message::Write(r) => r.span.len,
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
        regions: (0..REGIONS_MAX).map(region).collect(),
    };
    let acks = vec![(Seq(u64::MAX), Status::Stale); ACKS_MAX];
    let data = vec![3; IO_MAX as usize];
    for (message, payload) in [
        (Message::PromiseAck(state), None),
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
    let bytes = |at: usize, value: u32| {
        let mut f = frame(&write(512), 1, Some(raw(&[1; 512])));
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
    let long = [9, 0, 1];
    let cases: [(Message, usize, &[u8]); 8] = [
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
        (Message::Nack(Refusal::Failed), 0, &[7]),
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
        (Message::EpochChange(config), 16, COPIES_MAX as u32, 24),
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
    let read = Message::Read(Request {
        epoch: Epoch(1),
        seq: Seq(1),
        span: Span {
            offset: 0,
            len: 512,
        },
        fua: false,
    });
    let mut f = frame(&read, 1, None);
    forge(&mut f, 40, &(IO_MAX + 512).to_le_bytes());
    assert!(matches!(decode(&f), Err(WireError::TooLong { .. })));
}

#[test]
fn unknown_types_flags_versions_and_statuses_are_refused() {
    let detach = || frame(&Message::Detach { epoch: Epoch(1) }, 1, None);
    for kind in [0, 19, 255] {
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
    for status in [4u32, 256] {
        let mut f = frame(
            &Message::ReadReply {
                seq: Seq(1),
                status: Status::Io,
            },
            1,
            None,
        );
        forge(&mut f, 56, &status.to_le_bytes());
        assert_eq!(decode(&f), Err(WireError::Malformed("status")));
    }
    assert_eq!(needed(b"GET "), Err(WireError::Magic(*b"GET ")));
    assert_eq!(decode(b"H"), Err(WireError::Magic(*b"H\0\0\0")));
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
    fn hostile_headers_are_bounded(fields in prop::collection::vec(any::<u8>(), 55), kind in 0u8..20, body in prop::collection::vec(any::<u8>(), 0..600)) {
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
