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
    /// The average while no sync took more than the floor, each period weighing an eighth; 0 = not known.
    quiet: u64,
    since: Nanos,
}

impl Latency {
    /// A request took so long.
    pub fn add(&mut self, took: Nanos) {
        self.sum += took.0;
        self.count += 1;
    }

    /// At the end of a period: its average, if the guest asked for anything. `disturbed` says whether a sync took more than the
    /// floor in it. One at the floor counts as none: an attachment may begin with a sync and know nothing else, and a guest that
    /// asks for other things than before would be held against its past for as long as the sync takes.
    pub fn period(&mut self, now: Nanos, disturbed: bool) -> Option<Option<Nanos>> {
        if now.since(self.since) < PERIOD {
            return None;
        }
        self.since = now;
        let average = self.sum.checked_div(self.count);
        (self.sum, self.count) = (0, 0);
        if let (Some(average), false) = (average, disturbed) {
            self.quiet = match self.quiet {
                0 => average,
                quiet => quiet - quiet / 8 + average / 8,
            };
        }
        Some(average.map(Nanos))
    }

    /// What the guest's requests may take while a sync runs; `None` when they were never seen undisturbed.
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
    /// It takes as little as it can.
    pub fn is_at_floor(&self) -> bool {
        self.window == WINDOW_MIN
    }

    /// Chunks that may be under way.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// A period ended in which the guest's requests took `average` (`None`: there were none) where `limit` is what they may
    /// take: halved when they took longer, and one more when not; doubled when nobody asks for anything. At the floor until it is
    /// known what they may take.
    pub fn weigh(&mut self, average: Option<Nanos>, limit: Option<Nanos>) {
        self.window = match (average, limit) {
            (None, _) => self.window * 2,
            (Some(took), Some(limit)) if took > limit => self.window / 2,
            (Some(_), Some(_)) => self.window + 1,
            (Some(_), None) => WINDOW_MIN,
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
            (None, Some(ms(2)), 2),
            (None, None, 4),
            (Some(ms(3)), None, 1),
        ] {
            t.weigh(average, limit);
            assert_eq!(t.window(), window, "{average:?} of {limit:?}");
        }
        (0..10).for_each(|_| t.weigh(None, None));
        assert_eq!(t.window(), WINDOW_MAX);
    }

    #[test]
    fn an_attachment_that_begins_with_a_sync_yields_too() {
        // Each chunk under way makes the guest's requests so much slower; it was never seen without a sync.
        let (mut t, mut l) = (Throttle::default(), Latency::default());
        let mut windows = Vec::new();
        for n in 1..=200 {
            let slower = if n <= 100 { 1 } else { 5 };
            l.add(Nanos::from_ms(slower * u64::from(t.window())));
            let average = l.period(Nanos::from_ms(100 * n), !t.is_at_floor());
            t.weigh(average.unwrap(), l.limit());
            windows.push(t.window());
        }
        assert_eq!(windows[0], WINDOW_MIN, "nothing is known");
        // A request takes 1 ms at the floor, so it may take 2, which a third chunk exceeds.
        let (least, most) = (windows[2..100].iter().min(), windows[2..100].iter().max());
        assert_eq!((least, most), (Some(&1), Some(&3)));
        // The guest asks for larger things: that is learnt at the floor, and the sync goes on as before.
        assert_eq!(windows[150..].iter().max(), Some(&2));
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
