//! How fast a sync may go: it yields to the guest's latency, with a floor (PROTOCOL 6).

use super::ids::Nanos;

/// Copies that one node brings up to date at once, and that are brought up to date on one node at once, over all volumes.
/// With [`WINDOW_MAX`] for each that is 16 MiB under way: more than a disk or a 10 Gbit/s network needs to be busy, so a fifth
/// would only make each of the others slower, and their volumes' guests. Fewer would leave both idle while small syncs
/// do what takes no bytes: they are a dozen round trips and flushes.
pub const SYNCS_MAX: usize = 4;
/// Chunks under way at most: 4 MiB, what fills a fast network's round trip.
pub const WINDOW_MAX: u32 = 64;
/// The floor: one chunk is always under way, so that a sync ends under any load.
pub const WINDOW_MIN: u32 = 1;
/// Where a sync begins.
const WINDOW_START: u32 = 8;
/// How often the window is weighed.
const PERIOD: Nanos = Nanos::from_ms(100);
/// A guest's requests may become slower by this factor…
const FACTOR: u64 = 2;
/// …and by this, whichever is more: below it no guest notices.
const SLACK: Nanos = Nanos::from_ms(1);

/// The time of the guest's requests from being taken in to completion.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latency {
    sum: u64,
    count: u64,
    /// The average while no sync ran, each period weighing an eighth; 0 = not known.
    quiet: u64,
    since: Nanos,
}

impl Latency {
    /// A request took so long.
    pub fn add(&mut self, took: Nanos) {
        self.sum += took.0;
        self.count += 1;
    }

    /// At the end of a period: its average, if the guest asked for anything. `syncing` says whether a sync ran in it.
    pub fn period(&mut self, now: Nanos, syncing: bool) -> Option<Option<Nanos>> {
        if now.since(self.since) < PERIOD {
            return None;
        }
        self.since = now;
        let average = self.sum.checked_div(self.count);
        (self.sum, self.count) = (0, 0);
        if let (Some(average), false) = (average, syncing) {
            self.quiet = match self.quiet {
                0 => average,
                quiet => quiet - quiet / 8 + average / 8,
            };
        }
        Some(average.map(Nanos))
    }

    /// What the guest's requests may take while a sync runs; `None` when it was never seen without one.
    pub fn limit(&self) -> Option<Nanos> {
        (self.quiet > 0).then(|| Nanos((self.quiet * FACTOR).max(self.quiet + SLACK.0)))
    }
}

/// The window of one sync.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    window: u32,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            window: WINDOW_START,
        }
    }
}

impl Throttle {
    /// Chunks that may be under way.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// A period ended in which the guest's requests took `average` (`None`: there were none) where `limit` is what they may
    /// take: halved when they took longer, and one more when not; doubled when nobody asks for anything.
    pub fn weigh(&mut self, average: Option<Nanos>, limit: Option<Nanos>) {
        self.window = match (average, limit) {
            (None, _) => self.window * 2,
            (Some(took), Some(limit)) if took > limit => self.window / 2,
            (Some(_), _) => self.window + 1,
        }
        .clamp(WINDOW_MIN, WINDOW_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_yields_to_the_guest_and_never_closes() {
        let ms = Nanos::from_ms;
        let mut t = Throttle::default();
        // (the guest's average, its limit, the window after)
        for (average, limit, window) in [
            (Some(ms(1)), Some(ms(2)), 9),
            (Some(ms(3)), Some(ms(2)), 4),
            (Some(ms(3)), Some(ms(2)), 2),
            (Some(ms(3)), Some(ms(2)), 1),
            (Some(ms(30)), Some(ms(2)), 1),
            (Some(ms(3)), None, 2),
            (None, Some(ms(2)), 4),
            (None, None, 8),
        ] {
            t.weigh(average, limit);
            assert_eq!(t.window(), window, "{average:?} of {limit:?}");
        }
        (0..10).for_each(|_| t.weigh(None, None));
        assert_eq!(t.window(), WINDOW_MAX);
    }

    #[test]
    fn the_limit_comes_from_times_without_a_sync() {
        let ms = Nanos::from_ms;
        let mut l = Latency::default();
        assert_eq!(l.limit(), None);
        l.add(ms(4));
        l.add(ms(6));
        assert_eq!(l.period(ms(50), false), None, "a period is longer");
        assert_eq!(l.period(ms(200), false), Some(Some(ms(5))));
        assert_eq!(l.limit(), Some(ms(10)));
        l.add(ms(90));
        assert_eq!(l.period(ms(400), true), Some(Some(ms(90))));
        assert_eq!(
            l.limit(),
            Some(ms(10)),
            "a sync's own effect does not count"
        );
        assert_eq!(l.period(ms(600), true), Some(None));
        let mut fast = Latency::default();
        fast.add(Nanos(200_000));
        fast.period(ms(200), false);
        assert_eq!(fast.limit(), Some(Nanos(1_200_000)));
    }
}
