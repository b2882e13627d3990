//! virtio-queue reads the same random rings as ours, and both must see the same chains.

mod guest_driver;

use std::sync::Arc;

use guest_driver::*;
use lockstep::guest::{Chain, ChainFault, GuestMem, IoVec, Ring, RingError};
use proptest::prelude::*;
use virtio_queue::desc::split;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const ORACLE_SIZE: u16 = 16;
const TABLES: u64 = 0x4_0000;
const TABLE_STRIDE: u64 = 0x400;

/// Where a random descriptor points: mostly into memory, sometimes over an edge.
fn any_buffer() -> impl Strategy<Value = (u64, u32)> {
    prop_oneof![
        12 => (DATA..MIB - 0x1000, 1u32..0x1000),
        3 => (MIB - 0x800..MIB, 1u32..0x1000),
        1 => (2 * MIB - 0x10..2 * MIB + 0x10, 0u32..0x20),
        1 => (any::<u64>(), any::<u32>()),
    ]
}

fn any_desc(entries: u16, tables: bool) -> impl Strategy<Value = Desc> {
    let indirect = if tables { 2 } else { 0 };
    let plain = (any_buffer(), 0u16..4, 0..entries)
        .prop_map(|((addr, len), flags, next)| desc(addr, len, flags, next));
    let wild = (any_buffer(), any::<u16>(), any::<u16>())
        .prop_map(|((addr, len), flags, next)| desc(addr, len, flags & 7, next));
    let table = (0u64..8, 0u32..18, 0u16..4).prop_map(|(table, n, flags)| {
        desc(
            TABLES + table * TABLE_STRIDE,
            n * 16,
            (flags & WRITE) | INDIRECT,
            0,
        )
    });
    prop_oneof![
        12 => plain.boxed(),
        1 => wild.boxed(),
        indirect => table.boxed(),
    ]
}

/// A sound chain of up to 8 descriptors through consecutive entries: most random rings are too broken to compare much.
fn sound_chain() -> impl Strategy<Value = Vec<Desc>> {
    (
        prop::collection::vec((DATA..MIB + MIB / 2, 1u32..0x1000), 1..8),
        0usize..8,
    )
        .prop_map(|(buffers, readable)| {
            let n = buffers.len();
            (0u16..)
                .zip(buffers)
                .map(|(i, (addr, len))| {
                    let at = usize::from(i);
                    let write = if at >= readable.min(n - 1) { WRITE } else { 0 };
                    let next = if at + 1 < n { NEXT } else { 0 };
                    desc(addr, len, write | next, i + 1)
                })
                .collect()
        })
}

fn any_table() -> impl Strategy<Value = Vec<Desc>> {
    prop_oneof![
        3 => sound_chain(),
        1 => prop::collection::vec(any_desc(16, false), 1..16),
    ]
}

fn any_ring() -> impl Strategy<Value = Vec<Desc>> {
    let size = usize::from(ORACLE_SIZE);
    prop_oneof![
        1 => prop::collection::vec(any_desc(ORACLE_SIZE, true), size),
        2 => (sound_chain(), prop::collection::vec(any_desc(ORACLE_SIZE, true), size)).prop_map(|(sound, mut ring)| {
            ring.splice(..sound.len(), sound);
            ring
        }),
    ]
}

/// What a chain looks like to the oracle: each descriptor's pieces, with direction. None if it breaks a rule.
fn by_the_rules(mem: &GuestMem, descs: &[split::Descriptor]) -> Option<Vec<(usize, usize, bool)>> {
    let mut out = Vec::new();
    let mut total = 0u64;
    let mut writing = false;
    for d in descs {
        if d.len() == 0 || (writing && !d.is_write_only()) {
            return None;
        }
        writing = d.is_write_only();
        total += u64::from(d.len());
        for slice in mem.get_slices(d.addr(), d.len() as usize) {
            let slice = slice.ok()?;
            out.push((
                slice.ptr_guard_mut().as_ptr() as usize,
                slice.len(),
                writing,
            ));
        }
    }
    // The iterator ends silently on any error; a chain that it finished has a last descriptor without a successor.
    let finished = descs.last().is_some_and(|d| !d.has_next());
    (finished && total <= u64::from(u32::MAX)).then_some(out)
}

/// The crate's mock driver is not used: its used ring begins within its available ring.
fn oracle(driver: &Driver) -> Queue {
    let mut queue = Queue::new(driver.size).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(driver.desc))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(driver.avail))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(driver.used))
        .unwrap();
    queue.set_ready(true);
    queue
}

fn seen(chain: &Chain) -> Vec<(usize, usize, bool)> {
    let of = |pieces: &[IoVec], w| {
        pieces
            .iter()
            .map(move |p| (p.ptr as usize, p.len, w))
            .collect::<Vec<_>>()
    };
    [of(chain.readable(), false), of(chain.writable(), true)].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_rings_are_read_as_the_oracle_reads_them(
        descs in any_ring(),
        tables in prop::collection::vec(any_table(), 8),
        heads in prop::collection::vec(prop_oneof![4 => Just(0u16), 8 => 0..ORACLE_SIZE, 1 => any::<u16>()], 0..=usize::from(ORACLE_SIZE)),
        start in any::<u16>(),
    ) {
        let mem = memory();
        let mut driver = Driver::new(Arc::clone(&mem), 0, ORACLE_SIZE);
        for (i, d) in (0u16..).zip(&descs) {
            driver.put(i, *d);
        }
        for (i, table) in (0u64..).zip(&tables) {
            driver.put_table(TABLES + i * TABLE_STRIDE, table);
        }
        driver.start_at(start);
        for head in &heads {
            driver.offer(*head);
        }

        let mut oracle = oracle(&driver);
        oracle.set_next_avail(start);
        let mut ring_start = driver.start(F_INDIRECT);
        ring_start.next_avail = start;
        let mut ring = Ring::new(ring_start).unwrap();

        let mut taken = Vec::new();
        while let Some(theirs) = oracle.pop_descriptor_chain(&*mem) {
            let head = theirs.head_index();
            let descs: Vec<_> = theirs.collect();
            let expected = by_the_rules(&mem, &descs);
            match ring.pop() {
                Ok(Some(ours)) => {
                    prop_assert_eq!(ours.head(), head);
                    if ours.fault().is_none() {
                        prop_assert_eq!(Some(seen(&ours)), expected);
                    } else {
                        prop_assert!(expected.is_none() || ours.fault() == Some(ChainFault::IndirectNext));
                    }
                    taken.push(head);
                }
                Ok(None) => prop_assert!(false, "the oracle has a chain more: {}", head),
                Err(RingError::DuplicateHead { head }) => {
                    // The oracle does not notice.
                    prop_assert!(taken.contains(&head));
                    return Ok(());
                }
                Err(error) => {
                    prop_assert!(expected.is_none(), "{}: {:?}", error, descs);
                    return Ok(());
                }
            }
        }
        // The oracle ends silently at a head that is out of range.
        match ring.pop() {
            Ok(left) => prop_assert!(left.is_none()),
            Err(error) => prop_assert!(matches!(error, RingError::HeadOutOfRange { .. }), "{}", error),
        }
    }
}
