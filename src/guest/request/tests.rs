//! Requests as a driver may cut them, and as it may not.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::guest::GuestMem;

const LIMITS: Limits = Limits {
    capacity_sectors: 64,
    read_only: false,
    block_size: BlockSize::B512,
};
/// Where the writable part of a test chain begins in guest memory.
const WRITABLE: u64 = 0x10_0000;

struct Guest {
    mem: Arc<GuestMem>,
    map: Rc<MemMap>,
}

impl Guest {
    fn new() -> Guest {
        let mem = Arc::new(GuestMem::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
        let map = Rc::new(MemMap::new(Arc::clone(&mem)));
        Guest { mem, map }
    }

    /// A chain of readable and writable pieces of the given lengths, with `bytes` in the readable ones. Both
    /// parts are filled with gaps, so that nothing is right by being adjacent.
    fn chain(&self, bytes: &[u8], readable: &[usize], writable: &[usize]) -> Chain {
        let mut iovecs = Vec::new();
        let mut rest = bytes;
        for (i, len) in readable.iter().enumerate() {
            let addr = i as u64 * 0x1000;
            let (now, later) = rest.split_at(*len);
            self.mem.write_slice(now, GuestAddress(addr)).unwrap();
            rest = later;
            self.map
                .push_pieces(addr, *len as u32, &mut iovecs)
                .unwrap();
        }
        assert!(rest.is_empty());
        let readable = iovecs.len();
        for (i, len) in writable.iter().enumerate() {
            let addr = WRITABLE + i as u64 * 0x1000;
            self.mem
                .write_slice(&vec![0xee; *len], GuestAddress(addr))
                .unwrap();
            self.map
                .push_pieces(addr, *len as u32, &mut iovecs)
                .unwrap();
        }
        Chain {
            head: 5,
            tail_known: !writable.is_empty(),
            walked: 0,
            iovecs,
            readable,
            fault: None,
            mem: Rc::clone(&self.map),
        }
    }

    /// All bytes of the writable part.
    fn written(&self, writable: &[usize]) -> Vec<u8> {
        let mut out = Vec::new();
        for (i, len) in writable.iter().enumerate() {
            let mut part = vec![0; *len];
            let addr = WRITABLE + i as u64 * 0x1000;
            self.mem.read_slice(&mut part, GuestAddress(addr)).unwrap();
            out.extend(part);
        }
        out
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [
        kind.to_le_bytes().as_slice(),
        &[0; 4],
        &sector.to_le_bytes(),
    ]
    .concat()
}

fn request(parsed: Result<Parsed, RingError>) -> Request {
    match parsed {
        Ok(Parsed::Request(request)) => request,
        other => panic!("not a request: {other:?}"),
    }
}

fn refused(parsed: Result<Parsed, RingError>) -> Refused {
    match parsed {
        Ok(Parsed::Refused(refused)) => refused,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_read_is_answered_with_its_data_and_a_status_behind_it() {
    let guest = Guest::new();
    let writable = [512, 513];
    let chain = guest.chain(&header(T_IN, 62), &[16], &writable);
    let request = request(Request::parse(chain, &LIMITS));
    assert_eq!(
        (request.kind(), request.sector(), request.offset()),
        (Kind::In, 62, 62 * 512)
    );
    assert_eq!(
        (request.data_len(), request.data().len(), request.head()),
        (1024, 2, 5)
    );
    assert_eq!(request.write_data(&[7; 1024]), 1024);
    let used = request.finish(Status::Ok);
    assert_eq!((used.head(), used.len()), (5, 1025));
    assert_eq!(guest.written(&writable), [vec![7; 1024], vec![0]].concat());
}

#[test]
fn a_failed_read_says_that_nothing_was_written() {
    let guest = Guest::new();
    let chain = guest.chain(&header(T_IN, 0), &[16], &[512, 1]);
    let used = request(Request::parse(chain, &LIMITS)).finish(Status::IoErr);
    assert_eq!(used.len(), 1);
    assert_eq!(guest.written(&[512, 1])[512], 1);
}

#[test]
fn a_write_never_touches_the_data_it_reads() {
    let guest = Guest::new();
    let bytes = [header(T_OUT, 1), vec![9; 512]].concat();
    let request = request(Request::parse(guest.chain(&bytes, &[528], &[1]), &LIMITS));
    let mut data = [0; 512];
    assert_eq!(
        (request.kind(), request.read_data(&mut data)),
        (Kind::Out, 512)
    );
    assert_eq!(data, [9; 512]);
    assert_eq!(request.write_data(&[1; 512]), 0);
    assert_eq!(request.finish(Status::Ok).len(), 1);
    assert_eq!(guest.written(&[1]), [0]);
}

#[test]
fn the_serial_is_cut_to_the_buffer() {
    let guest = Guest::new();
    for (len, used_len) in [(20, 21), (8, 9), (64, 21)] {
        let chain = guest.chain(&header(T_GET_ID, 0), &[16], &[len, 1]);
        let request = request(Request::parse(chain, &LIMITS));
        assert_eq!(request.kind(), Kind::GetId);
        request.write_id(&Serial::new("volume-0123456789-and-more"));
        assert_eq!(request.finish(Status::Ok).len(), used_len);
        let n = len.min(20);
        assert_eq!(guest.written(&[len])[..n], b"volume-0123456789-an"[..n]);
    }
}

#[test]
fn a_flush_has_no_data() {
    let guest = Guest::new();
    for writable in [[1].as_slice(), &[512, 1]] {
        let chain = guest.chain(&header(T_FLUSH, 99), &[16], writable);
        let request = request(Request::parse(chain, &LIMITS));
        assert_eq!(
            (request.kind(), request.data_len(), request.data()),
            (Kind::Flush, 0, [].as_slice())
        );
        assert_eq!(request.finish(Status::Ok).len(), 1);
    }
}

#[test]
fn what_breaks_the_rules_is_answered_with_an_error() {
    let guest = Guest::new();
    let out = |sector, len| [header(T_OUT, sector), vec![0; len]].concat();
    let range = |sector, sectors| Refusal::Range {
        sector,
        sectors,
        capacity: 64,
    };
    let cases: &[(Vec<u8>, &[usize], Refusal)] = &[
        (vec![], &[1], Refusal::ShortHeader(0)),
        (vec![0; 15], &[513], Refusal::ShortHeader(15)),
        (header(T_IN, 0), &[1], Refusal::Direction(T_IN)),
        (header(T_OUT, 0), &[1], Refusal::Direction(T_OUT)),
        (header(T_OUT, 0), &[512, 1], Refusal::Direction(T_OUT)),
        (out(0, 512), &[512, 1], Refusal::Direction(T_OUT)),
        (
            [header(T_IN, 0), vec![0; 512]].concat(),
            &[512, 1],
            Refusal::Direction(T_IN),
        ),
        (header(T_GET_ID, 0), &[1], Refusal::Direction(T_GET_ID)),
        (header(T_IN, 0), &[512], Refusal::PartSector(511)),
        (out(0, 100), &[1], Refusal::PartSector(100)),
        (header(T_IN, 64), &[512, 1], range(64, 1)),
        (header(T_IN, 63), &[1024, 1], range(63, 2)),
        (header(T_IN, u64::MAX), &[512, 1], range(u64::MAX, 1)),
        (out(u64::MAX - 1, 1024), &[1], range(u64::MAX - 1, 2)),
        (out(1 << 55, 512), &[1], range(1 << 55, 1)),
        (header(12, 0), &[1], Refusal::Unsupported(12)),
        (header(14, 0), &[1], Refusal::Unsupported(14)),
        (header(u32::MAX, 0), &[1], Refusal::Unsupported(u32::MAX)),
    ];
    for (bytes, writable, reason) in cases {
        let readable = if bytes.is_empty() {
            vec![]
        } else {
            vec![bytes.len()]
        };
        let answer = refused(Request::parse(
            guest.chain(bytes, &readable, writable),
            &LIMITS,
        ));
        assert_eq!(answer.reason, *reason);
        assert_eq!(answer.used.len(), 1);
        let status = *guest.written(writable).last().unwrap();
        let unsupported = matches!(reason, Refusal::Unsupported(_));
        assert_eq!(status, if unsupported { 2 } else { 1 }, "{reason}");
    }
    let read_only = Limits {
        read_only: true,
        ..LIMITS
    };
    let answer = refused(Request::parse(
        guest.chain(&out(0, 512), &[528], &[1]),
        &read_only,
    ));
    assert_eq!(answer.reason, Refusal::ReadOnly);
    let chain = guest.chain(&header(T_IN, 0), &[16], &[512, 1]);
    request(Request::parse(chain, &read_only)).abandon();
}

/// A segment as a driver writes it.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        sector.to_le_bytes().as_slice(),
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// Limits of a volume of a TiB.
const LARGE: Limits = Limits {
    capacity_sectors: 1 << 31,
    ..LIMITS
};

#[test]
fn zeros_are_asked_for_in_segments() {
    let guest = Guest::new();
    let at = |offset, len, unmap| Segment { offset, len, unmap };
    let most = MAX_ZERO_SECTORS;
    let many = MAX_ZERO_SEGMENTS as usize;
    let bytes = 512 * most;
    type Case<'a> = (u32, &'a Limits, Vec<Vec<u8>>, Vec<Segment>);
    let cases: &[Case<'_>] = &[
        // The unmap flag is a write-zeroes' own; a discard gives space back without it.
        (
            T_DISCARD,
            &LIMITS,
            vec![segment(3, 5, 0)],
            vec![at(3 * 512, 5 * 512, true)],
        ),
        (
            T_WRITE_ZEROES,
            &LIMITS,
            vec![segment(3, 5, 0), segment(9, 1, 1)],
            vec![at(3 * 512, 5 * 512, false), at(9 * 512, 512, true)],
        ),
        // Up to the end of the volume; as long and as many as was said; nothing at all, also behind the last sector.
        (
            T_DISCARD,
            &LIMITS,
            vec![segment(0, 64, 0)],
            vec![at(0, 64 * 512, true)],
        ),
        (
            T_DISCARD,
            &LARGE,
            vec![segment(u64::from(most), most, 0)],
            vec![at(u64::from(bytes), bytes, true)],
        ),
        (
            T_WRITE_ZEROES,
            &LIMITS,
            vec![segment(1, 1, 0); many],
            vec![at(512, 512, false); many],
        ),
        (
            T_DISCARD,
            &LIMITS,
            vec![segment(64, 0, 0)],
            vec![at(64 * 512, 0, true)],
        ),
    ];
    for (kind, limits, segments, expected) in cases {
        // The header's sector means nothing.
        let bytes = [header(*kind, u64::MAX), segments.concat()].concat();
        let chain = guest.chain(&bytes, &[16, bytes.len() - 16], &[1]);
        let request = request(Request::parse(chain, limits));
        let kind = if *kind == T_DISCARD {
            Kind::Discard
        } else {
            Kind::WriteZeroes
        };
        assert_eq!((request.kind(), request.data_len()), (kind, 0));
        assert_eq!(request.segments(), expected);
        assert_eq!(request.finish(Status::Ok).len(), 1);
        assert_eq!(guest.written(&[1]), [0]);
    }
}

#[test]
fn segments_that_break_the_rules_are_refused_by_the_right_status() {
    let guest = Guest::new();
    let blocks = Limits {
        block_size: BlockSize::B4096,
        ..LIMITS
    };
    let read_only = Limits {
        read_only: true,
        ..LIMITS
    };
    let range = |sector, sectors| Refusal::Range {
        sector,
        sectors,
        capacity: 64,
    };
    let part = |sector, sectors| Refusal::PartBlock {
        sector,
        sectors,
        block: 4096,
    };
    let flags = |kind, flags| Refusal::Flags { kind, flags };
    let good = segment(0, 1, 0);
    let both = [T_DISCARD, T_WRITE_ZEROES];
    type Case<'a> = (&'a [u32], &'a Limits, Vec<u8>, Refusal, u8);
    let cases: &[Case<'_>] = &[
        // How long the data is.
        (&both, &LIMITS, vec![0], Refusal::PartSegment(1), 1),
        (&both, &LIMITS, vec![0; 15], Refusal::PartSegment(15), 1),
        (&both, &LIMITS, vec![0; 17], Refusal::PartSegment(17), 1),
        (&both, &LIMITS, good.repeat(33), Refusal::Segments(33), 1),
        (
            &both,
            &LIMITS,
            good.repeat(1000),
            Refusal::Segments(1000),
            1,
        ),
        // How long a segment is.
        (
            &both,
            &LARGE,
            segment(0, MAX_ZERO_SECTORS + 1, 0),
            Refusal::LongSegment(MAX_ZERO_SECTORS + 1),
            1,
        ),
        (
            &both,
            &LARGE,
            segment(0, u32::MAX, 0),
            Refusal::LongSegment(u32::MAX),
            1,
        ),
        // Where it ends; the second of two as well as the first.
        (&both, &LIMITS, segment(64, 1, 0), range(64, 1), 1),
        (&both, &LIMITS, segment(0, 65, 0), range(0, 65), 1),
        (&both, &LIMITS, segment(65, 0, 0), range(65, 0), 1),
        (
            &both,
            &LIMITS,
            segment(u64::MAX, 1, 0),
            range(u64::MAX, 1),
            1,
        ),
        (&both, &LIMITS, segment(1 << 55, 8, 0), range(1 << 55, 8), 1),
        (
            &both,
            &LIMITS,
            [good.clone(), segment(60, 5, 0)].concat(),
            range(60, 5),
            1,
        ),
        // Whole blocks of 4 KiB, where the guest was told of such.
        (&both, &blocks, segment(4, 8, 0), part(4, 8), 1),
        (&both, &blocks, segment(8, 12, 0), part(8, 12), 1),
        (&both, &read_only, good.clone(), Refusal::ReadOnly, 1),
        // Flags: 5.2.6.2 wants UNSUPP, and that whatever else is wrong.
        (
            &[T_DISCARD],
            &LIMITS,
            segment(0, 1, 1),
            flags(T_DISCARD, 1),
            2,
        ),
        (
            &[T_DISCARD],
            &LIMITS,
            segment(0, 1, 2),
            flags(T_DISCARD, 2),
            2,
        ),
        (
            &[T_WRITE_ZEROES],
            &LIMITS,
            segment(0, 1, 3),
            flags(T_WRITE_ZEROES, 3),
            2,
        ),
        (
            &[T_WRITE_ZEROES],
            &LIMITS,
            [segment(99, 1, 0), segment(0, 1, 1 << 31)].concat(),
            flags(T_WRITE_ZEROES, 1 << 31),
            2,
        ),
    ];
    for (kinds, limits, data, reason, status) in cases {
        for kind in *kinds {
            let bytes = [header(*kind, 0), data.clone()].concat();
            // In pieces of a page at most, as `chain` lays them out.
            let readable = vec![0x1000; bytes.len() / 0x1000]
                .into_iter()
                .chain([bytes.len() % 0x1000])
                .collect::<Vec<_>>();
            let answer = refused(Request::parse(guest.chain(&bytes, &readable, &[1]), limits));
            assert_eq!(answer.reason, *reason);
            assert_eq!(
                (answer.used.len(), guest.written(&[1])),
                (1, vec![*status]),
                "{reason}"
            );
        }
    }
    // No data, or data to be written.
    for kind in both {
        for (data, writable) in [(0, vec![1]), (0, vec![17]), (16, vec![17])] {
            let bytes = [header(kind, 0), vec![0; data]].concat();
            let answer = refused(Request::parse(
                guest.chain(&bytes, &[bytes.len()], &writable),
                &LIMITS,
            ));
            assert_eq!(answer.reason, Refusal::Direction(kind));
            assert_eq!(guest.written(&writable).last(), Some(&1));
        }
    }
}

#[test]
fn a_fault_of_the_chain_is_answered_where_the_status_is_known() {
    let guest = Guest::new();
    let mut chain = guest.chain(&header(T_IN, 0), &[16], &[512, 1]);
    chain.fault = Some(ChainFault::Empty);
    let answer = refused(Request::parse(chain, &LIMITS));
    assert_eq!(answer.reason, Refusal::Chain(ChainFault::Empty));
    assert_eq!(guest.written(&[512, 1])[512], 1);

    let mut chain = guest.chain(&header(T_IN, 0), &[16], &[512]);
    chain.fault = Some(ChainFault::Empty);
    chain.tail_known = false;
    assert_eq!(
        Request::parse(chain, &LIMITS).unwrap_err(),
        RingError::NoStatus { head: 5 }
    );
    let chain = guest.chain(&header(T_FLUSH, 0), &[16], &[]);
    assert_eq!(
        Request::parse(chain, &LIMITS).unwrap_err(),
        RingError::NoStatus { head: 5 }
    );
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "without an answer")]
fn a_request_cannot_be_forgotten() {
    let guest = Guest::new();
    let chain = guest.chain(&header(T_FLUSH, 0), &[16], &[1]);
    drop(request(Request::parse(chain, &LIMITS)));
}

/// Cuts `total` bytes into pieces of at least one byte.
fn cuts(total: usize) -> impl Strategy<Value = Vec<usize>> {
    prop::collection::btree_set(1..total, 0..12).prop_map(move |at| {
        let ends = at.iter().copied().chain([total]);
        let starts = [0].into_iter().chain(at.iter().copied());
        starts.zip(ends).map(|(a, b)| b - a).collect()
    })
}

proptest! {
    // 2.7.4.3: the driver cuts as it likes.
    #[test]
    fn how_a_request_is_cut_makes_no_difference(
        readable in cuts(16 + 1024),
        header_cut in cuts(16),
        writable in cuts(1024 + 1),
        data in prop::collection::vec(any::<u8>(), 1024),
    ) {
        let guest = Guest::new();
        let bytes = [header(T_OUT, 3), data.clone()].concat();
        let write = request(Request::parse(guest.chain(&bytes, &readable, &[1]), &LIMITS));
        let mut read = vec![0; 1024];
        prop_assert_eq!(write.read_data(&mut read), 1024);
        prop_assert_eq!(&read, &data);
        prop_assert_eq!((write.sector(), write.data_len()), (3, 1024));
        prop_assert_eq!(write.finish(Status::Ok).len(), 1);
        prop_assert_eq!(guest.written(&[1]), [0]);

        let many: Vec<u8> = (0..32).flat_map(|n| segment(n, 1, 1)).collect();
        let bytes = [header(T_WRITE_ZEROES, 0), many].concat();
        let mut lengths: Vec<usize> = Vec::new();
        for len in &readable {
            let left = bytes.len() - lengths.iter().sum::<usize>();
            lengths.push((*len).min(left));
        }
        lengths.retain(|len| *len > 0);
        let zeroes = request(Request::parse(guest.chain(&bytes, &lengths, &[1]), &LIMITS));
        prop_assert!(zeroes.segments().iter().map(|s| s.offset).eq((0..32).map(|n| n * 512)));
        prop_assert_eq!(zeroes.finish(Status::Ok).len(), 1);

        let read = request(Request::parse(guest.chain(&header(T_IN, 3), &header_cut, &writable), &LIMITS));
        prop_assert!(read.data().iter().all(|piece| piece.len > 0));
        prop_assert_eq!(read.write_data(&data), 1024);
        prop_assert_eq!(read.finish(Status::Ok).len(), 1025);
        prop_assert_eq!(guest.written(&writable), [data, vec![0]].concat());
    }
}
