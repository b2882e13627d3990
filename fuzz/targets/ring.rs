//! A ring and its guest, who writes whatever it likes at any moment.
//!
//! Input: log2 of the ring's size, flags (1: event indices, 2: indirect descriptors, 4: tracked), then actions: a byte, and
//! what it takes.

use std::sync::Arc;

use lockstep::guest::{Chain, InflightQueue, InflightRegion, Ring, RingStart};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::GuestAddress;

use super::{Input, address, descriptor, inside, memory, put, start, used};

const ACTIONS: usize = 400;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let size = 1u16 << (input.u8() % 7);
    let flags = input.u8();
    let features = u64::from(flags & 1) << 29 | u64::from(flags >> 1 & 1) << 28;
    let mem = memory();
    let tracked = (flags & 4 != 0).then(|| {
        let asked = VhostUserInflight::new(0, 0, 1, size);
        let (info, file) = InflightRegion::create(&asked, 1).unwrap();
        Arc::new(InflightRegion::open(&info, file, 1).unwrap())
    });
    let begin = |next_avail: u16| {
        Ring::new(RingStart {
            next_avail,
            inflight: tracked
                .as_ref()
                .and_then(|region| InflightQueue::of(region, 0)),
            ..start(&mem, size, features)
        })
    };
    let Ok(mut ring) = begin(0) else { return };
    let mut held: Vec<Chain> = Vec::new();
    let mut pushed = ring.next_used();
    let avail = 16 * u64::from(size);
    for _ in 0..ACTIONS {
        if input.is_empty() {
            break;
        }
        match input.u8() % 12 {
            0 | 1 => {
                let index = u64::from(input.u8()) % u64::from(size);
                put(&mem, 16 * index, &descriptor(&mut input));
            }
            2 => {
                let (slot, head) = (u64::from(input.u8()) % u64::from(size), input.u8());
                put(&mem, avail + 4 + 2 * slot, &u16::from(head).to_le_bytes());
            }
            3 => put(&mem, avail + 2, &input.u16().to_le_bytes()),
            4 => {
                let at = address(&mut input);
                put(&mem, at, &descriptor(&mut input));
            }
            5 => {
                let (at, n) = (address(&mut input), usize::from(input.u8()));
                put(&mem, at, input.bytes(n));
            }
            6 | 7 => take(&mut ring, &mut held, &mem),
            8 => {
                let at = usize::from(input.u8());
                if !held.is_empty() {
                    let chain = held.swap_remove(at % held.len());
                    ring.push_used(chain.complete(input.u32()));
                    pushed = pushed.wrapping_add(1);
                }
            }
            9 => {
                ring.publish();
                let _ = ring.needs_notify();
                let _ = ring.enable_kicks();
            }
            10 => ring.disable_kicks(),
            // The process dies, and another one goes on with what it finds.
            _ => {
                ring.publish();
                held.clear();
                let Ok(next) = begin(ring.next_avail()) else {
                    return;
                };
                ring = next;
                pushed = ring.next_used();
            }
        }
        assert_eq!(usize::from(ring.in_flight()), held.len());
    }
    for chain in held.drain(..) {
        ring.push_used(chain.complete(1));
        pushed = pushed.wrapping_add(1);
    }
    ring.publish();
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(ring.next_used(), pushed);
    let mut seen = [0; 2];
    vm_memory::Bytes::read_slice(&*mem, &mut seen, GuestAddress(used(size) + 2)).unwrap();
    // The guest may have written over it.
    let _ = u16::from_le_bytes(seen);
}

fn take(ring: &mut Ring, held: &mut Vec<Chain>, mem: &lockstep::guest::GuestMem) {
    match ring.pop() {
        Ok(Some(chain)) => {
            assert!(chain.head() < ring.size());
            assert!(held.iter().all(|other| other.head() != chain.head()));
            assert!(!ring.is_broken());
            inside(mem, chain.readable());
            inside(mem, chain.writable());
            held.push(chain);
        }
        Ok(None) => {}
        Err(_) => {
            assert!(ring.is_broken());
            assert!(matches!(ring.pop(), Ok(None)));
        }
    }
}
