//! The split ring against a driver that does as it likes.

mod guest_driver;

use std::rc::Rc;
use std::sync::Arc;

use guest_driver::*;
use lockstep::engine::buffer::{Bytes, GuestPart, GuestRequest};
use lockstep::guest::{
    BlockSize, Chain, ChainFault, GuestMem, IoVec, Limits, MAX_DATA_SEGMENTS, Parsed, Ring,
    RingError, Status, copy_from_guest,
};
use vm_memory::GuestAddress;

fn driver(size: u16) -> Driver {
    Driver::new(memory(), 0, size)
}

fn ring(driver: &Driver) -> Ring {
    Ring::new(driver.start(F_INDIRECT | F_EVENT_IDX)).unwrap()
}

fn lens(pieces: &[IoVec]) -> Vec<usize> {
    pieces.iter().map(|p| p.len).collect()
}

fn take(ring: &mut Ring) -> Chain {
    ring.pop().unwrap().expect("a chain")
}

#[test]
fn a_chain_arrives_as_it_was_described() {
    let mut driver = driver(8);
    let mut ring = ring(&driver);
    assert!(ring.pop().unwrap().is_none());

    driver.write(DATA, b"sixteen bytes...");
    driver.offer_chain(
        3,
        &[
            desc(DATA, 16, 0, 0),
            desc(DATA + 0x100, 0x200, WRITE, 0),
            desc(DATA + 0x400, 1, WRITE, 0),
        ],
    );
    let chain = take(&mut ring);
    assert_eq!((chain.head(), chain.fault()), (3, None));
    assert_eq!(lens(chain.readable()), [16]);
    assert_eq!(lens(chain.writable()), [0x200, 1]);
    let mut bytes = [0; 16];
    // SAFETY: the chain is alive.
    unsafe { copy_from_guest(chain.readable(), &mut bytes) };
    assert_eq!(&bytes, b"sixteen bytes...");
    assert_eq!(ring.in_flight(), 1);

    ring.push_used(chain.complete(0x201));
    assert!(
        driver.completions().is_empty(),
        "not before it is published"
    );
    ring.publish();
    assert_eq!(driver.completions(), [(3, 0x201)]);
    assert_eq!(
        (ring.in_flight(), ring.next_avail(), ring.next_used()),
        (0, 1, 1)
    );
}

#[test]
fn completions_may_come_in_any_order_and_indices_wrap() {
    let mut driver = driver(4);
    driver.start_at(u16::MAX - 5);
    let mut ring = ring(&driver);
    for _ in 0..20 {
        for head in [2, 0, 3] {
            driver.offer_chain(head, &[desc(DATA, 1, WRITE, 0)]);
        }
        let chains: Vec<_> = (0..3).map(|_| take(&mut ring)).collect();
        assert!(ring.pop().unwrap().is_none());
        for chain in chains.into_iter().rev() {
            ring.push_used(chain.complete(1));
        }
        ring.publish();
        assert_eq!(driver.completions(), [(3, 1), (0, 1), (2, 1)]);
    }
}

#[test]
fn a_ring_continues_where_the_last_process_stopped() {
    let mut driver = driver(8);
    driver.start_at(40);
    driver.offer_chain(0, &[desc(DATA, 1, WRITE, 0)]);
    driver.offer_chain(1, &[desc(DATA, 1, WRITE, 0)]);
    let mut start = driver.start(0);
    start.next_avail = 41;
    let mut ring = Ring::new(start).unwrap();
    let chain = take(&mut ring);
    assert_eq!(chain.head(), 1);
    ring.push_used(chain.complete(1));
    ring.publish_and_notify();
    assert_eq!(driver.completions(), [(1, 1)]);
}

#[test]
fn a_buffer_over_two_regions_becomes_two_pieces() {
    let mut driver = driver(8);
    let mut ring = ring(&driver);
    driver.offer_chain(0, &[desc(MIB - 0x100, 0x300, WRITE, 0)]);
    let chain = take(&mut ring);
    assert_eq!(lens(chain.writable()), [0x100, 0x200]);
}

#[test]
fn an_indirect_chain_may_be_longer_than_the_ring() {
    // Windows makes 512 data segments, a header, a status and one more on rings of 128.
    let mut driver = driver(4);
    let mut ring = ring(&driver);
    let table: Vec<_> = (0..515)
        .map(|i: u16| {
            let write = if i == 0 { 0 } else { WRITE };
            let next = if i == 514 { 0 } else { NEXT };
            desc(
                DATA + 0x1000 * u64::from(i % 16),
                0x200,
                write | next,
                i + 1,
            )
        })
        .collect();
    let at = MIB + 8;
    driver.put_table(at, &table);
    driver.offer_chain(1, &[desc(at, 515 * 16, INDIRECT | WRITE, 0)]);
    let chain = take(&mut ring);
    assert_eq!(
        (
            chain.fault(),
            chain.readable().len(),
            chain.writable().len()
        ),
        (None, 1, 514)
    );

    // Direct descriptors may come before the indirect one, and the table need not be aligned.
    driver.put_table(at + 1, &[desc(DATA, 1, WRITE, 0)]);
    driver.offer_chain(2, &[desc(DATA, 16, 0, 0), desc(at + 1, 16, INDIRECT, 0)]);
    let chain = take(&mut ring);
    assert_eq!((chain.head(), chain.fault()), (2, None));
    assert_eq!((chain.readable().len(), chain.writable().len()), (1, 1));
}

#[test]
fn chains_keep_their_memory_when_the_table_changes() {
    let mut driver = driver(8);
    let mut ring = ring(&driver);
    driver.write(DATA, b"old");
    driver.offer_chain(0, &[desc(DATA, 3, 0, 0)]);
    let chain = take(&mut ring);

    let new = memory();
    let old = std::mem::replace(&mut driver.mem, Arc::clone(&new));
    drop(old);
    driver.write(DATA, b"new");
    // The new table's ring starts as zeros; bring it to the same state.
    driver.set_avail_idx(1);
    ring.set_memory(new).unwrap();
    let mut bytes = [0; 3];
    // SAFETY: the chain is alive.
    unsafe { copy_from_guest(chain.readable(), &mut bytes) };
    assert_eq!(&bytes, b"old");
    ring.push_used(chain.complete(0));
    ring.publish();
    assert_eq!(driver.completions(), [(0, 0)]);

    let elsewhere = GuestMem::from_ranges(&[(GuestAddress(4 * MIB), MIB as usize)]).unwrap();
    assert!(matches!(
        ring.set_memory(Arc::new(elsewhere)),
        Err(RingError::Unmapped { .. })
    ));
    assert!(ring.is_broken() && ring.pop().unwrap().is_none());
}

#[test]
fn a_ring_must_have_a_sound_size_and_place() {
    let driver = driver(8);
    let try_start = |change: &dyn Fn(&mut lockstep::guest::RingStart)| {
        let mut start = driver.start(0);
        change(&mut start);
        Ring::new(start).map(|_| ()).unwrap_err()
    };
    for size in [0, 3, 0x8001, u16::MAX] {
        assert_eq!(try_start(&|s| s.size = size), RingError::Size { size });
    }
    for (by, part) in [(8, 0), (1, 1), (2, 2)] {
        let error = try_start(&|s| match part {
            0 => s.desc.0 += by,
            1 => s.avail.0 += by,
            _ => s.used.0 += by,
        });
        assert!(matches!(error, RingError::Alignment { .. }), "{error}");
    }
    for addr in [2 * MIB, 5 * MIB, !15, MIB - 16] {
        let error = try_start(&|s| s.desc.0 = addr);
        assert!(
            matches!(error, RingError::Unmapped { .. }),
            "{addr:#x}: {error}"
        );
    }
    let end = MIB - 4 - 16;
    assert!(matches!(
        try_start(&|s| s.avail.0 = end),
        RingError::Unmapped { .. }
    ));
    assert!(matches!(
        try_start(&|s| s.used.0 = MIB - 64),
        RingError::Unmapped { .. }
    ));
}

/// A hostile act on a ring of 8 entries, and what must come of it.
type Hostile = (&'static str, fn(&mut Driver), fn(&RingError) -> bool);

#[test]
fn a_ring_that_cannot_be_trusted_is_given_up() {
    let cases: &[Hostile] = &[
        (
            "index jumps",
            |d| d.set_avail_idx(9),
            |e| matches!(e, RingError::AvailableIndex { ahead: 9, .. }),
        ),
        (
            "index goes back",
            |d| d.set_avail_idx(u16::MAX),
            |e| matches!(e, RingError::AvailableIndex { .. }),
        ),
        (
            "head out of range",
            |d| d.offer(8),
            |e| matches!(e, RingError::HeadOutOfRange { head: 8 }),
        ),
        (
            "huge head",
            |d| d.offer(u16::MAX),
            |e| matches!(e, RingError::HeadOutOfRange { .. }),
        ),
        (
            "self loop",
            |d| {
                d.put(0, desc(DATA, 16, NEXT, 0));
                d.offer(0);
            },
            |e| matches!(e, RingError::Loop { head: 0 }),
        ),
        (
            "loop of all",
            |d| {
                for i in 0..8 {
                    d.put(i, desc(DATA, 16, NEXT, (i + 1) % 8));
                }
                d.offer(5);
            },
            |e| matches!(e, RingError::Loop { head: 5 }),
        ),
        (
            "next out of range",
            |d| {
                d.put(0, desc(DATA, 16, NEXT, 8));
                d.offer(0);
            },
            |e| matches!(e, RingError::NextOutOfRange { next: 8, .. }),
        ),
        (
            "loop in an indirect table",
            |d| {
                d.put_table(
                    DATA,
                    &[
                        desc(DATA, 1, NEXT | WRITE, 1),
                        desc(DATA, 1, NEXT | WRITE, 0),
                    ],
                );
                d.offer_chain(0, &[desc(DATA, 32, INDIRECT, 0)]);
            },
            |e| matches!(e, RingError::Loop { .. }),
        ),
        (
            "next outside an indirect table",
            |d| {
                d.put_table(DATA, &[desc(DATA, 1, NEXT | WRITE, 2)]);
                d.offer_chain(0, &[desc(DATA, 32, INDIRECT, 0)]);
            },
            |e| matches!(e, RingError::NextOutOfRange { next: 2, .. }),
        ),
        (
            "indirect within indirect",
            |d| {
                d.put_table(DATA, &[desc(DATA, 16, INDIRECT, 0)]);
                d.offer_chain(0, &[desc(DATA, 16, INDIRECT, 0)]);
            },
            |e| matches!(e, RingError::NestedIndirect { .. }),
        ),
        (
            "empty table",
            |d| d.offer_chain(0, &[desc(DATA, 0, INDIRECT, 0)]),
            |e| matches!(e, RingError::IndirectLength { len: 0, .. }),
        ),
        (
            "part of a descriptor",
            |d| d.offer_chain(0, &[desc(DATA, 24, INDIRECT, 0)]),
            |e| matches!(e, RingError::IndirectLength { .. }),
        ),
        (
            "huge table",
            |d| d.offer_chain(0, &[desc(0, 32769 * 16, INDIRECT, 0)]),
            |e| matches!(e, RingError::IndirectLength { .. }),
        ),
        (
            "table in a hole",
            |d| d.offer_chain(0, &[desc(2 * MIB - 16, 32, INDIRECT, 0)]),
            |e| matches!(e, RingError::IndirectUnmapped { .. }),
        ),
        (
            "table at the end of the address space",
            |d| d.offer_chain(0, &[desc(u64::MAX - 15, 16, INDIRECT, 0)]),
            |e| matches!(e, RingError::IndirectUnmapped { .. }),
        ),
    ];
    for (name, act, expected) in cases {
        let mut driver = driver(8);
        let mut ring = ring(&driver);
        act(&mut driver);
        let error = ring.pop().expect_err(name);
        assert!(expected(&error), "{name}: {error}");
        assert!(ring.is_broken(), "{name}");
        // From then on the ring is silent, whatever comes.
        driver.offer_chain(0, &[desc(DATA, 1, WRITE, 0)]);
        assert!(ring.pop().unwrap().is_none(), "{name}");
        assert!(!ring.enable_kicks(), "{name}");
    }
}

#[test]
fn a_head_that_is_in_flight_is_not_taken_again() {
    let mut driver = driver(8);
    let mut ring = ring(&driver);
    driver.offer_chain(1, &[desc(DATA, 1, WRITE, 0)]);
    let chain = take(&mut ring);
    driver.offer(1);
    assert_eq!(
        ring.pop().unwrap_err(),
        RingError::DuplicateHead { head: 1 }
    );
    // What was taken before is still completed.
    ring.push_used(chain.complete(1));
    ring.publish();
    assert_eq!(driver.completions(), [(1, 1)]);
}

#[test]
fn indirect_descriptors_need_their_feature() {
    let mut driver = driver(8);
    let mut ring = Ring::new(driver.start(0)).unwrap();
    driver.put_table(DATA, &[desc(DATA, 1, WRITE, 0)]);
    driver.offer_chain(0, &[desc(DATA, 16, INDIRECT, 0)]);
    assert_eq!(
        ring.pop().unwrap_err(),
        RingError::IndirectNotNegotiated { head: 0 }
    );
}

/// A chain that ends in a byte for the status, and the fault that it must be given out with.
type Faulty = (&'static str, Vec<Desc>, fn(ChainFault) -> bool);

#[test]
fn a_chain_that_breaks_a_rule_is_given_out_with_the_reason() {
    let status = desc(DATA + 0x2000, 1, WRITE, 0);
    let head = desc(DATA, 16, 0, 0);
    let unmapped = |f| matches!(f, ChainFault::Unmapped { .. });
    let cases: Vec<Faulty> = vec![
        (
            "in a hole",
            vec![head, desc(3 * MIB, 512, WRITE, 0), status],
            unmapped,
        ),
        (
            "into a hole",
            vec![head, desc(2 * MIB - 1, 2, WRITE, 0), status],
            unmapped,
        ),
        (
            "after the end",
            vec![head, desc(5 * MIB, 1, 0, 0), status],
            unmapped,
        ),
        (
            "wrapping",
            vec![head, desc(u64::MAX - 1, 512, WRITE, 0), status],
            unmapped,
        ),
        ("empty", vec![head, desc(DATA, 0, WRITE, 0), status], |f| {
            f == ChainFault::Empty
        }),
        ("order", vec![desc(DATA, 1, WRITE, 0), head, status], |f| {
            f == ChainFault::Order
        }),
        (
            "4 GiB",
            vec![head, desc(0, u32::MAX - 16, WRITE, 0), status],
            // Whichever is noticed first: so much memory does not exist here.
            |f| matches!(f, ChainFault::Unmapped { .. } | ChainFault::TooLong),
        ),
    ];
    for (name, descs, expected) in cases {
        let mut driver = driver(8);
        let mut ring = ring(&driver);
        driver.offer_chain(0, &descs);
        let chain = take(&mut ring);
        let fault = chain.fault().unwrap_or_else(|| panic!("{name}: no fault"));
        assert!(expected(fault), "{name}: {fault}");
        assert!(!ring.is_broken(), "{name}");
        ring.push_used(chain.complete(1));
    }
}

#[test]
fn pieces_and_bytes_of_a_chain_are_bounded() {
    let mut driver = driver(4);
    let mut ring = ring(&driver);
    let long = MAX_DATA_SEGMENTS as u16 + 4;
    let table: Vec<_> = (0..long)
        .map(|i| desc(DATA, 1, WRITE | if i + 1 == long { 0 } else { NEXT }, i + 1))
        .collect();
    driver.put_table(MIB, &table);
    driver.offer_chain(0, &[desc(MIB, u32::from(long) * 16, INDIRECT, 0)]);
    let chain = take(&mut ring);
    assert_eq!(chain.fault(), Some(ChainFault::TooManySegments));
    assert_eq!(
        chain.writable().len(),
        1,
        "only the place of the status is kept"
    );
    ring.push_used(chain.complete(1));

    driver.put_table(DATA, &[desc(DATA, 1, WRITE, 0)]);
    driver.put(2, desc(DATA, 16, INDIRECT | NEXT, 3));
    driver.offer(2);
    assert_eq!(take(&mut ring).fault(), Some(ChainFault::IndirectNext));

    // 520 buffers of 8 MiB: each exists, together they are more than 4 GiB.
    let mem = GuestMem::from_ranges(&[(GuestAddress(0), 16 * MIB as usize)]).unwrap();
    let mut driver = Driver::new(Arc::new(mem), 0, 4);
    let mut ring = self::ring(&driver);
    let big = |n: u16| -> Vec<Desc> {
        (1..=n)
            .map(|i| {
                desc(
                    8 * MIB,
                    8 * MIB as u32,
                    WRITE | if i == n { 0 } else { NEXT },
                    i,
                )
            })
            .collect()
    };
    for (n, fault) in [
        (511u16, None),
        (512, Some(ChainFault::TooLong)),
        (520, Some(ChainFault::TooLong)),
    ] {
        driver.put_table(MIB, &big(n));
        driver.offer_chain(0, &[desc(MIB, u32::from(n) * 16, INDIRECT, 0)]);
        let chain = take(&mut ring);
        assert_eq!(chain.fault(), fault, "{n}");
        ring.push_used(chain.complete(0));
    }
}

#[test]
fn with_event_indices_one_notification_is_given_per_step_over_the_event() {
    let mut driver = driver(8);
    let mut ring = ring(&driver);
    let mut complete = |driver: &mut Driver, n: u16| {
        for head in 0..n {
            driver.offer_chain(head, &[desc(DATA, 1, WRITE, 0)]);
        }
        for _ in 0..n {
            let chain = take(&mut ring);
            ring.push_used(chain.complete(1));
        }
        ring.publish();
        let wanted = ring.needs_notify();
        assert!(!ring.needs_notify(), "nothing new since");
        wanted
    };
    driver.set_used_event(1000);
    assert!(
        complete(&mut driver, 1),
        "the first time it is not known what the guest saw"
    );
    assert!(!complete(&mut driver, 3), "1000 is far");
    driver.set_used_event(5);
    assert!(
        !complete(&mut driver, 1),
        "index 5 is to be crossed, not reached"
    );
    assert!(complete(&mut driver, 1));
    driver.set_used_event(7);
    assert!(complete(&mut driver, 4), "crossed within a batch");
    driver.set_no_interrupt(true);
    driver.set_used_event(10);
    assert!(
        complete(&mut driver, 1),
        "the flag means nothing with event indices"
    );
}

#[test]
fn without_event_indices_the_no_interrupt_flag_counts() {
    let mut driver = driver(8);
    let mut ring = Ring::new(driver.start(0)).unwrap();
    for quiet in [false, true, false] {
        driver.set_no_interrupt(quiet);
        driver.offer_chain(0, &[desc(DATA, 1, WRITE, 0)]);
        let chain = take(&mut ring);
        ring.push_used(chain.complete(1));
        ring.publish_and_notify();
        assert_eq!(driver.was_called(), !quiet);
        ring.publish_and_notify();
        assert!(!driver.was_called(), "nothing new since");
    }
}

#[test]
fn kicks_are_asked_for_without_losing_a_request() {
    for features in [0, F_EVENT_IDX] {
        let mut driver = driver(8);
        let mut ring = Ring::new(driver.start(features)).unwrap();
        ring.disable_kicks();
        assert_eq!(driver.used_flags(), u16::from(features == 0));
        driver.offer_chain(0, &[desc(DATA, 1, WRITE, 0)]);
        assert!(ring.enable_kicks(), "one came meanwhile");
        assert!(ring.pop().unwrap().is_some());
        assert!(!ring.enable_kicks());
        assert_eq!(driver.used_flags(), 0);
        assert_eq!(driver.avail_event(), u16::from(features != 0));
    }
}

#[test]
fn descriptors_are_swapped_under_a_running_ring() {
    let driver = driver(8);
    let mut ring = ring(&driver);
    assert!(
        driver.was_called(),
        "at the start: an earlier process may have died before it did"
    );
    driver.kick.write(3).unwrap();
    ring.drain_kick();
    assert!(driver.kick.read().is_err(), "drained");

    let other = self::driver(8);
    let old = ring.set_kick(owned(&other.kick));
    drop(old);
    other.kick.write(1).unwrap();
    ring.drain_kick();
    assert!(other.kick.read().is_err());

    ring.set_call(Some(owned(&other.call)));
    assert!(
        other.was_called(),
        "at once: something may have been published before"
    );
    ring.notify();
    assert!(other.was_called() && !driver.was_called());
    ring.set_call(None);
    ring.notify();
    assert!(!other.was_called());
}

#[test]
#[should_panic(expected = "not in flight")]
fn a_chain_of_another_ring_is_not_pushed() {
    let (mut a, b) = (driver(8), driver(8));
    let (mut ring_a, mut ring_b) = (ring(&a), ring(&b));
    a.offer_chain(1, &[desc(DATA, 1, WRITE, 0)]);
    let chain = take(&mut ring_a);
    ring_b.push_used(chain.complete(1));
}

#[test]
fn a_write_that_was_sent_elsewhere_keeps_the_bytes_it_had_then() {
    // Given a write of two parts from guest memory,
    let mut driver = driver(8);
    let mut ring = ring(&driver);
    driver.write(DATA, &header(T_OUT, 0));
    driver.write(DATA + 0x1000, &[1; 2048]);
    driver.offer_chain(
        0,
        &[
            desc(DATA, 16, 0, 0),
            desc(DATA + 0x1000, 2048, 0, 0),
            desc(DATA + 0x3000, 1, WRITE, 0),
        ],
    );
    let limits = Limits {
        capacity_sectors: 8,
        read_only: false,
        block_size: BlockSize::B512,
    };
    let Some(Parsed::Request(request)) = ring.next_request(&limits).unwrap() else {
        panic!("a request")
    };
    let request = GuestRequest::new(request, 0, 0, 2);
    let part = |start| {
        let (request, len) = (Rc::clone(&request), 1024);
        Bytes::Guest(GuestPart {
            request,
            start,
            len,
        })
    };
    let bytes = |data: Bytes| match data {
        Bytes::Buffer(buffer) => buffer.to_vec(),
        Bytes::Guest(_) => panic!("bytes of ours"),
    };
    // then it goes to the disk here as it is,
    assert!(matches!(part(0).stable(false), Bytes::Guest(_)));
    // but when one part is sent elsewhere, both get what it was at that moment, whatever the guest does to it,
    assert_eq!(bytes(part(0).stable(true)), [1; 1024]);
    driver.write(DATA + 0x1000, &[2; 2048]);
    assert_eq!(bytes(part(0).stable(true)), [1; 1024]);
    assert_eq!(bytes(part(0).stable(false)), [1; 1024]);
    // and the other part is a matter of its own.
    assert!(matches!(part(1024).stable(false), Bytes::Guest(_)));
    assert_eq!(bytes(part(1024).stable(true)), [2; 1024]);
    // When the guest was answered, what was taken is still there, and nothing else is taken.
    assert!(request.finish(Status::Ok).is_some());
    assert_eq!(bytes(part(0).stable(true)), [1; 1024]);
}
