//! What a seed decides before anything happens: how many nodes, how large a volume, how rough the weather.

use std::collections::{BinaryHeap, HashMap, VecDeque};

use lockstep::replication::copy_state::{BITMAPS_MAX, CopyState, Standing};
use lockstep::replication::failure_mode::FailureMode;
use lockstep::replication::ids::{
    BootId, CHUNK, CopyId, Epoch, Instance, Nanos, NodeName, REGION, SECTOR, Tag, VolumeId,
};
use lockstep::replication::record::{Base, CopyEntry, CopyStatus, Record, State};
use lockstep::replication::timing::Timing;

use super::control::Made;
use super::disk::Disk;
use super::faults::{FAULTS, Fault, Weather};
use super::network::Partitions;
use super::nodes::{Clock, Node};
use super::oracle::Oracle;
use super::registry::Registry;
use super::rng::Rng;
use super::scrub::Scrubs;
use super::seen::Seen;
use super::world::{Ev, MS, World};

impl World {
    pub fn new(seed: u64, verbose: bool) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5bd1_e995);
        let copies = rng.pick(&[1, 2, 2, 2, 3, 3, 3, 4]) as usize;
        let remote = rng.one_in(3);
        let spare = rng.pick(&[0, 0, 1, 1, 2]) as usize;
        let count = copies + usize::from(remote || copies == 1 && rng.one_in(2)) + spare;
        let size = rng.pick(&[
            8 * CHUNK,
            8 * CHUNK,
            REGION + 4 * CHUNK,
            2 * REGION + SECTOR * 24,
            // Larger than what the guest writes about: regions that no log names.
            4 * REGION + 3 * CHUNK,
        ]);
        let wanted = (copies - 1) as u8;
        let mode = rng.pick(&[
            FailureMode::Hard,
            FailureMode::Soft(None),
            FailureMode::Soft(Some(1)),
            FailureMode::AlwaysOn,
            FailureMode::AlwaysOn,
        ]);
        let volume_id = VolumeId(rng.id());
        let (epoch, tag) = (Epoch(1), Tag(rng.next()));
        let mut nodes = Vec::new();
        let mut entries = Vec::new();
        for n in 0..count {
            let name = NodeName(format!("n{n}"));
            let copy_id = CopyId(rng.id());
            let disk = (n < copies).then(|| {
                entries.push(CopyEntry {
                    copy_id,
                    node: name.clone(),
                    status: CopyStatus::InSync,
                    base: Base {
                        since: epoch,
                        last: None,
                    },
                    boot_id: None,
                    leaving: false,
                });
                Disk::new(CopyState {
                    volume_id,
                    copy_id,
                    size,
                    epoch,
                    tag,
                    promised: epoch,
                    standing: Standing::InSync,
                    clean: true,
                    bitmaps: [None; BITMAPS_MAX],
                })
            });
            nodes.push(Node {
                name,
                up: false,
                paused_until: 0,
                boot: BootId(rng.id()),
                instance: Instance(rng.id()),
                process: 0,
                copy: 0,
                replica: None,
                disk,
                gone: false,
                fenced: false,
                cut: 0,
                gapped: false,
                clock: Clock::new(&mut rng),
                looked: 0,
            });
        }
        let record = Record {
            volume_id,
            size,
            block_size: 512,
            replicas_wanted: wanted,
            failure_mode: mode,
            suspend_deadline_ms: rng.pick(&[0, 1_000, 30_000, 30_000]),
            compress: true,
            epoch,
            epoch_tag: tag,
            state: State::Clean,
            attachment: None,
            master: entries[rng.below(copies as u64) as usize].copy_id,
            preferred: None,
            grow: None,
            copies: entries,
            lineage: vec![(epoch, tag)],
        };
        let mut kinds: Vec<Fault> = FAULTS.into_iter().filter(|_| rng.one_in(2)).collect();
        if kinds.is_empty() {
            kinds.push(Fault::Reset);
        }
        if rng.one_in(4) {
            kinds = vec![Fault::Isolate, Fault::Isolate, Fault::Reset, Fault::Pause];
        }
        let weather = Weather {
            every_ms: rng.pick(&[300, 800, 2_000, 5_000]),
            kinds,
            disk_faults: rng.one_in(4),
            last_disk: rng.one_in(4),
            slow_disk: rng.pick(&[0, 0, 50, 400]),
            ambiguous: rng.pick(&[0, 3, 10]),
            registry_down: rng.pick(&[0, 0, 5]),
            writeback: !rng.one_in(6),
            rot: rng.one_in(3),
            watch_lag: rng.pick(&[0, 0, 4_000]),
            wanders: rng.one_in(2),
            constant: rng.one_in(3),
            scrub: rng.one_in(2),
            scrub_repairs: rng.one_in(2),
        };
        let all = (size / SECTOR) as usize;
        let hot = (0..6)
            .map(|_| match rng.below(3) {
                0 => all - 16,
                1 => (rng.below(size / CHUNK) * CHUNK / SECTOR) as usize,
                _ => rng.below(all as u64 - 16) as usize,
            })
            .map(|s| s.saturating_sub(4).min(all - 16))
            .collect();
        let timing = Timing {
            // What is in no log is what S11 is about: as long as regions stay there, no other rule can fail it.
            idle: Nanos::from_ms(rng.pick(&[300, 300, 1_000, 4_000, 30_000])),
            ..Timing::DEFAULT
        };
        let mut world = Self {
            now: MS,
            moment: 1,
            order: 0,
            queue: BinaryHeap::new(),
            nodes,
            atts: Vec::new(),
            sessions: Vec::new(),
            partitions: Partitions::default(),
            made: Made::new(),
            syncs: HashMap::new(),
            scrubs: Scrubs::default(),
            slow_net_until: 0,
            slow_node: None,
            registry: Registry::new(record),
            registry_down_until: 0,
            isolated: (0, 0),
            all_cut: 0,
            oracle: Oracle::default(),
            timing,
            budget: rng.between(100, 800),
            fua: !weather.writeback,
            weather,
            faults: true,
            calm_since: 0,
            guest_stopped: false,
            verifying: false,
            next_id: 1,
            hot,
            trace: VecDeque::new(),
            verbose,
            answered: None,
            seen: Seen::default(),
            rng,
        };
        world.say(|w| {
            format!(
                "{} copies on {} nodes, {} bytes, {:?}, faults {:?} every {} ms",
                w.registry.record.copies.len(),
                w.nodes.len(),
                w.registry.record.size,
                w.registry.record.failure_mode,
                w.weather.kinds,
                w.weather.every_ms
            )
        });
        for n in 0..count {
            world.start_node(n);
        }
        world.after(0, Ev::Operator);
        world.after(100 * MS, Ev::Control);
        world.after(2_000 * MS, Ev::Fault);
        world.after(1_000 * MS, Ev::Scrub);
        world
    }
}
