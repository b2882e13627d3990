//! One chain as a request, answered. Nothing may change in guest memory but the used ring and what the chain's writable
//! descriptors name.
//!
//! Input: flags (1: read-only, 2: indirect descriptors), number of descriptors, each with twelve bytes; the same for an
//! indirect table at [`TABLE`]; the header's type and sector, put where the first descriptor points; the rest is at
//! [`DATA`].

use std::sync::Arc;

use lockstep::guest::{BlockSize, GuestMem, Kind, Limits, Parsed, Ring, Serial, Status};
use vm_memory::{Bytes, GuestAddress};

use super::{Input, REGIONS, descriptor, inside, memory, put, start, used};

const SIZE: u16 = 16;
const TABLE: u64 = 0x1000;
const TABLE_SIZE: u8 = 32;
const CAPACITY: u64 = 64;
const DATA: u64 = 0x5000;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let features = u64::from(flags >> 1 & 1) << 28;
    let mem = memory();
    let count = u64::from(input.u8() % (SIZE as u8 + 1));
    for index in 0..count {
        put(&mem, 16 * index, &descriptor(&mut input));
    }
    let entries = u64::from(input.u8() % (TABLE_SIZE + 1));
    for index in 0..entries {
        put(&mem, TABLE + 16 * index, &descriptor(&mut input));
    }
    let header = [
        &u32::from(input.u8()).to_le_bytes()[..],
        &[0; 4],
        &match input.u8() {
            sector @ 0..=199 => u64::from(sector),
            _ => input.u64(),
        }
        .to_le_bytes(),
    ]
    .concat();
    for table in [0, TABLE] {
        let mut first = [0; 8];
        mem.read_slice(&mut first, GuestAddress(table)).unwrap();
        // Not over what was just laid out.
        let at = u64::from_le_bytes(first);
        if at >= TABLE + 16 * u64::from(TABLE_SIZE) {
            put(&mem, at, &header);
        }
    }
    put(&mem, DATA, input.bytes(4096));
    let avail = 16 * u64::from(SIZE);
    put(&mem, avail + 2, &1u16.to_le_bytes());

    let before = image(&mem);
    let allowed = writable(&mem, features != 0);
    let mut ring = Ring::new(start(&mem, SIZE, features)).unwrap();
    let limits = Limits {
        capacity_sectors: CAPACITY,
        read_only: flags & 1 != 0,
        block_size: BlockSize::B512,
    };
    match ring.next_request(&limits) {
        Ok(Some(Parsed::Request(request))) => {
            inside(&mem, request.data());
            let len: usize = request.data().iter().map(|piece| piece.len).sum();
            if matches!(request.kind(), Kind::In | Kind::Out) {
                assert_eq!(len, request.data_len() as usize);
                assert!(len > 0 && len.is_multiple_of(512));
                assert!(request.offset() + len as u64 <= CAPACITY * 512);
            }
            let changes = matches!(
                request.kind(),
                Kind::Out | Kind::Discard | Kind::WriteZeroes
            );
            assert!(!(changes && limits.read_only));
            for segment in request.segments() {
                assert!(segment.offset + u64::from(segment.len) <= CAPACITY * 512);
                assert!(segment.offset.is_multiple_of(512) && segment.len.is_multiple_of(512));
            }
            match request.kind() {
                Kind::In => assert_eq!(request.write_data(&vec![0xab; len]), len),
                Kind::Out => assert_eq!(request.read_data(&mut vec![0; len]), len),
                Kind::GetId => request.write_id(&Serial::new("fuzz")),
                _ => {}
            }
            let used = request.finish(Status::Ok);
            assert!(u64::from(used.len()) <= 1 + len as u64);
            ring.push_used(used);
        }
        Ok(Some(Parsed::Refused(refused))) => ring.push_used(refused.used),
        Ok(None) => panic!("a chain was offered"),
        Err(_) => assert!(ring.is_broken()),
    }
    ring.publish();
    let after = image(&mem);
    let used = used(SIZE)..used(SIZE) + 6 + 8 * u64::from(SIZE);
    for (at, (old, new)) in before.iter().zip(&after).enumerate() {
        let at = at as u64;
        let may = used.contains(&at) || allowed.iter().any(|range| range.contains(&u128::from(at)));
        assert!(
            old == new || may,
            "byte {at:#x} was changed from {old} to {new}"
        );
    }
}

/// All of guest memory, by its address; a hole is zeros.
fn image(mem: &GuestMem) -> Vec<u8> {
    let (last, len) = REGIONS[REGIONS.len() - 1];
    let mut bytes = vec![0; last as usize + len];
    for (start, len) in REGIONS {
        let part = &mut bytes[start as usize..][..len];
        mem.read_slice(part, GuestAddress(start)).unwrap();
    }
    bytes
}

/// What any writable descriptor names, in the ring and in tables that a descriptor of it names.
fn writable(mem: &Arc<GuestMem>, indirect: bool) -> Vec<std::ops::Range<u128>> {
    let mut out = Vec::new();
    let mut tables = vec![(0u64, u32::from(SIZE), true)];
    while let Some((table, entries, outer)) = tables.pop() {
        for index in 0..entries.min(4096) {
            let mut raw = [0; 16];
            let at = table.wrapping_add(16 * u64::from(index));
            if mem.read_slice(&mut raw, GuestAddress(at)).is_err() {
                break;
            }
            let (addr, rest) = raw.split_at(8);
            let addr = u64::from_le_bytes(addr.try_into().unwrap());
            let len = u32::from_le_bytes(rest[..4].try_into().unwrap());
            if rest[4] & 2 != 0 {
                out.push(u128::from(addr)..u128::from(addr) + u128::from(len));
            }
            if rest[4] & 4 != 0 && outer && indirect {
                tables.push((addr, len / 16, false));
            }
        }
    }
    out
}
