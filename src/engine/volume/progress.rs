//! How far the syncs of a volume are, as events: for whoever follows them, or reads them afterwards.

use std::collections::HashMap;

use super::Volume;
use crate::cluster::host::SyncProgress;
use crate::cluster::units::show_size;
use crate::engine::buffer::Bytes;
use crate::engine::command::Event;
use crate::engine::context::Context;
use crate::replication::attachment::{Attachment, SyncView};
use crate::replication::ids::Nanos;

/// A sync is spoken of each time that one more of so many equal parts of it is done. So a long one leaves room in the list of
/// events for what matters more.
const PARTS: u64 = 10;
/// And not more often than this: of a short one its begin and its end say enough.
const APART: Nanos = Nanos::from_ms(1_000);

/// What was said of each sync, by the copy's place in the record.
#[derive(Debug, Default)]
pub(super) struct Told(HashMap<usize, Said>);

#[derive(Clone, Copy, Debug)]
struct Said {
    total: u64,
    parts: u64,
    at: Nanos,
}

impl Told {
    /// Forgets the syncs that are over.
    fn keep(&mut self, runs: impl Fn(usize) -> bool) {
        self.0.retain(|copy, _| runs(*copy));
    }

    /// How much of the sync is done, in percent, if that is to be said now.
    fn news(&mut self, now: Nanos, copy: usize, sync: SyncView) -> Option<u64> {
        let total = sync.total_bytes;
        let done = total.saturating_sub(sync.remaining_bytes);
        // Nothing is known before all marks are.
        let parts = (done * PARTS).checked_div(total)?;
        let begun = Said {
            total,
            parts: 0,
            at: now,
        };
        let said = self.0.entry(copy).or_insert(begun);
        if said.total != total || parts < said.parts {
            // Another one than before.
            *said = begun;
        }
        if parts == said.parts || parts == PARTS || now.since(said.at) < APART {
            return None;
        }
        (said.parts, said.at) = (parts, now);
        Some(parts * 100 / PARTS)
    }
}

/// All syncs together.
pub(super) fn in_all(attachment: Option<&Attachment<Bytes>>) -> SyncView {
    let Some(attachment) = attachment else {
        return SyncView::default();
    };
    let views = attachment.sync_views().map(|(_, view)| SyncView {
        // While marks are read, more are found.
        total_bytes: view.total_bytes.max(view.remaining_bytes),
        ..view
    });
    views.fold(SyncView::default(), SyncView::plus)
}

impl Volume {
    /// Says how far syncs are, now and then.
    pub(super) fn tell_progress(&mut self, ctx: &Context) {
        let Some(s) = &mut self.serving else { return };
        let Some(attachment) = &s.attachment else {
            return;
        };
        s.told.keep(|copy| attachment.is_syncing(copy));
        for (copy, sync) in attachment.sync_views() {
            let Some(percent) = s.told.news(ctx.now, copy, sync) else {
                continue;
            };
            let record = attachment.record();
            let (left, rate) = (sync.remaining_bytes, sync.bytes_per_second);
            let mut text = format!(
                "copy on {}: {percent} %, {} left",
                record.copies[copy].node,
                show_size(left)
            );
            if let Some(eta) = SyncProgress::new(left, sync.total_bytes, rate).eta_seconds {
                text += &format!(", {}/s, about {eta} s to go", show_size(rate));
            }
            let rule = "6 progress";
            log::info!("volume {}: [{rule}] {text}", s.name);
            let _ = ctx.events.send(Event {
                volume: self.id,
                rule,
                epoch: record.epoch,
                text,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_is_spoken_of_at_each_tenth_and_not_too_often() {
        let mut told = Told::default();
        let mut at = |ms, remaining_bytes, total_bytes| {
            let sync = SyncView {
                remaining_bytes,
                total_bytes,
                bytes_per_second: 1,
            };
            told.news(Nanos::from_ms(ms), 1, sync)
        };
        // While marks are read there is no whole.
        assert_eq!(at(0, 10, 0), None);
        assert_eq!(at(100, 1000, 1000), None);
        assert_eq!(at(900, 400, 1000), None, "too soon");
        assert_eq!(at(1100, 399, 1000), Some(60));
        assert_eq!(at(2200, 301, 1000), None, "not a tenth more");
        assert_eq!(at(2300, 300, 1000), Some(70));
        assert_eq!(at(9000, 0, 1000), None, "its end says so itself");
        // Begun anew, it is another one.
        assert_eq!(at(9100, 1000, 1000), None);
        assert_eq!(at(11_000, 900, 1000), Some(10));
    }
}
