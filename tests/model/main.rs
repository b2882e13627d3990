//! The protocol's decisions in a small world, every order of events tried (PROTOCOL 9): three copies, two chunks, and a few of
//! each fault. The simulator runs the product's state machines under random faults; here they are abstracted to `state`, so
//! that all states can be visited, and call the product's pure functions: membership, failure mode, takeover, fence, resync,
//! what the registry answers.
//!
//! - `state`: what there is; `record`: the product's record in it;
//! - `copies`, `attachment`, `sync`: what each side does; `faults`: what happens to them; `actions`: all of it, as steps;
//! - `bounds`: how much of each; `mistakes`: that the model can fail;
//! - `oracle`: what the guest may read; `properties`: what must hold, and what must have been seen.

mod actions;
mod attachment;
mod bounds;
mod copies;
mod faults;
mod mistakes;
mod oracle;
mod properties;
mod record;
mod state;
mod sync;

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::copy_state::Standing;
use lockstep::replication::ids::{Epoch, Tag};
use stateright::{Checker, Expectation, HasDiscoveries, Model, Property};

use actions::Action;
use bounds::Bound;
use record::Rec;
use state::{ALL, Attachment, CHUNKS, COPIES, Disk, Oracle, Phase, Registry, Spent, State};

impl Model for Bound {
    type State = State;
    type Action = Action;

    /// An attachment serves from its home since epoch 1; all that is not blank is in sync.
    fn init_states(&self) -> Vec<State> {
        let held = Rec::new(record::first(self.home, self.blank, self.mode));
        let copy = |c: usize| {
            let blank = self.blank.has(c);
            let epoch = Epoch(u64::from(!blank));
            let mut copy = Disk {
                epoch,
                tag: Tag(epoch.0),
                promised: epoch,
                standing: Standing::InSync,
                maps: CopySet::EMPTY,
                log: 0,
                marked_on_disk: [0; COPIES],
                on_disk: [0; CHUNKS],
                data: [0; CHUNKS],
                boot: 0,
                marked: [0; COPIES],
                mirrored: CopySet::EMPTY,
                target: None,
                bound: (!blank).then_some(0),
                holder: None,
                unclaimed: None,
                heard: true,
                whole: !blank,
                promise_on_disk: epoch,
            };
            if !blank {
                copy.keeps_bitmaps(c, self.blank, CopySet::EMPTY);
            }
            copy
        };
        let mut first = Attachment::new(self.home, held, 1);
        first.phase = Phase::Serving;
        (first.proven, first.asks) = (false, Epoch(0));
        first.stable = ALL;
        let mut state = State {
            up: (0..=COPIES).collect(),
            cut_off: None,
            copies: [0, 1, 2].map(copy),
            attachments: [Some(first), None, None],
            started: 1,
            registry: Registry {
                record: held,
                revision: 1,
                late: None,
            },
            oracle: Oracle::new(),
            spent: Spent::default(),
            broken: None,
        };
        state.advance(0, self);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.steps(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        #[cfg(feature = "mutants")]
        lockstep::replication::mutants::choose(self.mistake);
        self.step(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::properties()
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.registry.record.record.epoch.0 <= self.epochs
            && state.copies.iter().all(|c| c.promised.0 <= self.epochs)
    }
}

/// Runs the checker to its end, or to the first rule that is broken, and says how much there was.
fn run(bound: Bound) -> impl Checker<Bound> {
    let begun = std::time::Instant::now();
    let name = bound.name;
    let checker = bound
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    eprintln!(
        "{name}: {} unique states of {}, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    checker
}

/// The rules that a run broke, each with the steps that lead there.
fn broken(checker: &impl Checker<Bound>) -> Vec<(&'static str, Vec<Action>)> {
    let all = checker.model().properties();
    let rules = all.iter().filter(|p| p.expectation == Expectation::Always);
    let path = |p: &Property<Bound>| Some((p.name, checker.discovery(p.name)?.into_actions()));
    rules.filter_map(path).collect()
}

/// Runs these bounds. No rule is broken in any; all that must be seen is, in one or another.
fn check(bounds: Vec<Bound>) {
    let mut unseen: Vec<&str> = properties::properties()
        .iter()
        .filter(|p| p.expectation == Expectation::Sometimes)
        .map(|p| p.name)
        .collect();
    for bound in bounds {
        let name = bound.name;
        let checker = run(bound);
        if let Some((rule, steps)) = broken(&checker).first() {
            panic!("{name}: {rule} is broken by {steps:#?}");
        }
        unseen.retain(|p| checker.discovery(p).is_none());
    }
    assert!(unseen.is_empty(), "never seen: {unseen:?}");
}

#[test]
fn no_order_of_events_breaks_a_rule() {
    check(bounds::small());
}

/// Only when `scripts/model` asks for it: the larger bounds, one of them, or one described in the same variable.
#[test]
fn nor_does_any_within_a_larger_bound() {
    let Ok(which) = std::env::var("LOCKSTEP_MODEL") else {
        return;
    };
    if which.is_empty() {
        // The test's, too: some of what must be seen is in none of the larger ones.
        return check(bounds::small().into_iter().chain(bounds::large()).collect());
    }
    let named = bounds::small().into_iter().chain(bounds::large());
    let bound = match named.into_iter().find(|b| b.name == which) {
        Some(bound) => bound,
        None => Bound::described(&which),
    };
    let checker = run(bound);
    for p in checker.model().properties() {
        if p.expectation == Expectation::Sometimes && checker.discovery(p.name).is_none() {
            eprintln!("  not seen: {}", p.name);
        }
    }
    let broken = broken(&checker);
    for (rule, steps) in &broken {
        eprintln!("  {rule} is broken after {} steps:", steps.len());
        steps.iter().for_each(|s| eprintln!("    {s:?}"));
    }
    if let Some((rule, _)) = broken.first() {
        let path = checker.discovery(rule).expect("it was found");
        panic!("{rule} is broken in {:#?}", path.last_state());
    }
}
