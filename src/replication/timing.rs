//! How long the protocol waits (PROTOCOL 2.6, 4, 5). One value, so that tests and the simulator can shrink it whole.

use super::ids::Nanos;

/// All of the protocol's times.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two heartbeats to one copy.
    pub heartbeat: Nanos,
    /// A heartbeat sent less than this ago and acknowledged lets the attachment serve reads.
    pub lease: Nanos,
    /// A copy promises a new epoch only after it heard nothing of the old attachment for this long. Above `lease`, by
    /// more than clocks of two machines drift apart in that time.
    pub grace: Nanos,
    /// How long a copy whose connection broke may take to come back before it is ejected.
    pub hold: Nanos,
    /// A copy that was silent for this long is ejected.
    pub silence: Nanos,
    /// A copy that leaves one request unanswered for this long is ejected, even though it sends heartbeats.
    pub late: Nanos,
    /// How long an attach waits for the promise of an in-sync copy it cannot reach.
    pub join: Nanos,
    /// Between two attempts to connect.
    pub redial: Nanos,
    /// Between two attempts at the registry.
    pub registry_retry: Nanos,
    /// With unflushed writes and no flush from the guest, all copies are flushed this often, so that regions retire.
    pub background_flush: Nanos,
    /// A region that nobody wrote for this long leaves the activity log once it is durable on all copies: what is not in the log
    /// needs no comparison after a crash.
    pub idle: Nanos,
}

impl Timing {
    /// The product's defaults.
    pub const DEFAULT: Self = Self {
        heartbeat: Nanos::from_ms(250),
        lease: Nanos::from_ms(2_000),
        grace: Nanos::from_ms(3_000),
        hold: Nanos::from_ms(400),
        silence: Nanos::from_ms(2_000),
        late: Nanos::from_ms(5_000),
        join: Nanos::from_ms(3_000),
        redial: Nanos::from_ms(50),
        registry_retry: Nanos::from_ms(200),
        background_flush: Nanos::from_ms(5_000),
        idle: Nanos::from_ms(30_000),
    };
}
