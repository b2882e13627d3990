//! What a copy's promise and epoch keep out (PROTOCOL 4, 5; S2, S7): pure functions of what its disk says.

use super::ids::{Epoch, NodeName, Tag};
use super::message::{Promise, Proof};

/// S7: a request of another epoch than the copy's, or of one below its promise, is not accepted.
pub fn accepts(mine: Epoch, promised: Epoch, epoch: Epoch) -> bool {
    epoch == mine && promised <= epoch
}

/// S2: whether a copy that has promised `promised` may promise `epoch`. `again`: it was this candidate that it promised.
pub fn promises(promised: Epoch, epoch: Epoch, again: bool) -> bool {
    epoch > promised || epoch == promised && again
}

/// S2: whether a copy in epoch and tag `mine` that has promised `promised` takes this configuration as a member.
pub fn configures(mine: (Epoch, Tag), promised: Epoch, epoch: Epoch, tag: Tag) -> bool {
    epoch >= promised.max(mine.0) && (epoch != mine.0 || tag == mine.1)
}

/// Whether the candidate has shown that the former attachment cannot write any more, so that the copy need not wait for the
/// grace. `holder`: the node that the copy takes for the former attachment's, if it knows.
pub fn is_proven(promise: &Promise, mine: Epoch, holder: Option<&NodeName>) -> bool {
    match promise.proof {
        Proof::None => false,
        Proof::Released(epoch) => epoch >= mine,
        Proof::PredecessorDead => holder.is_none_or(|h| *h == promise.candidate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::ids::Instance;

    #[test]
    fn nothing_of_another_epoch_or_below_the_promise_is_taken() {
        // (mine, promised, asked; a request; a promise, to the same one again; a configuration with my tag, with another)
        for (mine, promised, asked, request, promise, again, config, other) in [
            (5, 5, 5, true, false, true, true, false),
            (5, 5, 6, false, true, true, true, true),
            (5, 5, 4, false, false, false, false, false),
            (5, 6, 5, false, false, false, false, false),
            (5, 6, 6, false, false, true, true, true),
            (5, 6, 7, false, true, true, true, true),
            (0, 0, 1, false, true, true, true, true),
        ] {
            let (mine, promised, asked) = (Epoch(mine), Epoch(promised), Epoch(asked));
            let why = format!("{mine} {promised} {asked}");
            assert_eq!(accepts(mine, promised, asked), request, "{why}");
            assert_eq!(promises(promised, asked, false), promise, "{why}");
            assert_eq!(promises(promised, asked, true), again, "{why}");
            let mine = (mine, Tag(1));
            assert_eq!(configures(mine, promised, asked, Tag(1)), config, "{why}");
            assert_eq!(configures(mine, promised, asked, Tag(2)), other, "{why}");
        }
    }

    #[test]
    fn a_proof_holds_for_the_attachment_that_the_copy_knows() {
        let (n1, n2) = (NodeName("n1".into()), NodeName("n2".into()));
        // (proof of a candidate on n1, the holder, proven) for a copy in epoch 5
        for (proof, holder, proven) in [
            (Proof::None, None, false),
            (Proof::None, Some(&n1), false),
            (Proof::Released(Epoch(5)), Some(&n2), true),
            (Proof::Released(Epoch(4)), Some(&n2), false),
            (Proof::PredecessorDead, Some(&n1), true),
            (Proof::PredecessorDead, Some(&n2), false),
            (Proof::PredecessorDead, None, true),
        ] {
            let promise = Promise {
                epoch: Epoch(6),
                candidate: n1.clone(),
                instance: Instance([1; 16]),
                proof,
                probe: false,
            };
            assert_eq!(
                is_proven(&promise, Epoch(5), holder),
                proven,
                "{proof:?} {holder:?}"
            );
        }
    }
}
