//! Requests as a driver may cut them, and as it may not.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::guest::GuestMem;

const LIMITS: Limits = Limits {
    capacity_sectors: 64,
    read_only: false,
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
        (header(11, 0), &[1], Refusal::Unsupported(11)),
        (header(13, 0), &[1], Refusal::Unsupported(13)),
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

        let read = request(Request::parse(guest.chain(&header(T_IN, 3), &header_cut, &writable), &LIMITS));
        prop_assert!(read.data().iter().all(|piece| piece.len > 0));
        prop_assert_eq!(read.write_data(&data), 1024);
        prop_assert_eq!(read.finish(Status::Ok).len(), 1025);
        prop_assert_eq!(guest.written(&writable), [data, vec![0]].concat());
    }
}
