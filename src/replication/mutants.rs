//! Deliberate mistakes that the simulator's checkers must find (PROTOCOL 9): each breaks one rule at the place that keeps it.
//!
//! They exist only in a build with the feature `mutants`, which no release has; there a thread chooses one for itself with
//! `choose`. Otherwise [`on`] is `false`, at compile time.

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A lost copy's answers are waived at once, before the record says that it is out.
    CompleteBeforeCas,
    /// A promise is answered before it is on the disk.
    SkipPromiseFsync,
    /// A copied chunk's mark is cleared before the target has flushed it.
    ClearBeforeFlush,
    /// A region leaves the log when its writes are done, not when every copy has flushed them.
    RetireBeforeFlush,
    /// What a returning copy's own log says is not marked.
    DropReturningLog,
    /// Whoever has the highest epoch on its disk is taken for whole.
    HighestCounter,
    /// A known identity is taken for known content, and a wiped disk keeps its own.
    ReuseIdentity,
    /// A write goes to the target of a sync although its chunk is marked, and the chunk counts as copied.
    MirrorIntoDirty,
    /// A flush is completed when one copy has flushed.
    FlushOneCopy,
    /// Reads are completed without a lease.
    ReadWithoutLease,
    /// A compare-and-swap whose outcome is unknown is taken for one that failed.
    AmbiguousIsFailed,
    /// The record says a size before the copies have room for it.
    GrowUnasked,
    /// A scrub compares chunks that are being written.
    ScrubUnheld,
    /// A scrub repairs from another copy than the one that reads come from.
    RepairFromReplica,
    /// A scrub takes what a copy answered before it was lost for what it holds.
    ScrubThroughLoss,
}

/// Whether this thread makes this mistake.
#[cfg(not(feature = "mutants"))]
pub(super) const fn on(_: Mutant) -> bool {
    false
}

#[cfg(feature = "mutants")]
pub use chosen::*;

#[cfg(feature = "mutants")]
mod chosen {
    use super::Mutant;
    use std::cell::Cell;

    thread_local! {
        static CHOSEN: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether this thread makes this mistake.
    pub fn on(mutant: Mutant) -> bool {
        CHOSEN.get() == Some(mutant)
    }

    /// This thread makes this mistake from now on, and no other.
    pub fn choose(mutant: Option<Mutant>) {
        CHOSEN.set(mutant);
    }

    impl Mutant {
        /// All of them.
        pub const ALL: [Self; 15] = [
            Self::CompleteBeforeCas,
            Self::SkipPromiseFsync,
            Self::ClearBeforeFlush,
            Self::RetireBeforeFlush,
            Self::DropReturningLog,
            Self::HighestCounter,
            Self::ReuseIdentity,
            Self::MirrorIntoDirty,
            Self::FlushOneCopy,
            Self::ReadWithoutLease,
            Self::AmbiguousIsFailed,
            Self::GrowUnasked,
            Self::ScrubUnheld,
            Self::RepairFromReplica,
            Self::ScrubThroughLoss,
        ];
    }
}
