//! What the runs have met.

/// What a suite of runs must have seen somewhere (PROTOCOL 9, non-vacuity).
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub completed: u64,
    pub failed: u64,
    pub promotions: u64,
    pub ejections: u64,
    pub attaches: u64,
    pub ambiguous: u64,
    pub reconciled_differing: u64,
    pub power_losses: u64,
    pub connections: u64,
    pub detaches: u64,
    pub dead: u64,
    pub collapses: u64,
}

impl Seen {
    pub fn add(&mut self, o: &Self) {
        self.completed += o.completed;
        self.failed += o.failed;
        self.promotions += o.promotions;
        self.ejections += o.ejections;
        self.attaches += o.attaches;
        self.ambiguous += o.ambiguous;
        self.reconciled_differing += o.reconciled_differing;
        self.power_losses += o.power_losses;
        self.connections += o.connections;
        self.detaches += o.detaches;
        self.dead += o.dead;
        self.collapses += o.collapses;
    }
}
