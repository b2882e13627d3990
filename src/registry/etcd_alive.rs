//! An announcement in etcd: the key `alive/<name>/<lease>`, which goes with its lease.
//!
//! The lease is renewed three times in its life, so that one question may be lost: one message every 10 s a node. Renewals
//! are not part of etcd's history and wake no watch; only a beginning and an end are. What fails is tried again, and what
//! expired meanwhile is made anew: the process lives, whatever etcd thought.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::etcd::operation;
use super::etcd_members::{CallError, Kind, Members};
use super::etcd_proto::{
    LEASE_GRANT, LEASE_KEEP_ALIVE, LEASE_REVOKE, LeaseGrantRequest, LeaseGrantResponse,
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest, LeaseRevokeResponse, Op,
    PutRequest, TXN, TxnRequest, TxnResponse,
};

/// Between two attempts while etcd does not answer, at most.
const RETRY: Duration = Duration::from_secs(2);
/// How long the end of a lease may take: whoever waits for it wants to end.
const REVOKE: Duration = Duration::from_millis(800);

/// A lease as etcd granted it.
#[derive(Clone, Copy)]
struct Lease {
    id: i64,
    ttl: Duration,
}

struct Keeper {
    members: Arc<Members>,
    /// What the key begins with. The lease's number ends it, so that two who announce one name do not end each other.
    key: Vec<u8>,
    ttl: Duration,
}

/// Keeps a key that begins with `key` there until the other end of `withdrawn` is dropped.
pub(super) async fn keep(
    members: Arc<Members>,
    registry: Arc<str>,
    key: Vec<u8>,
    ttl: Duration,
    mut withdrawn: oneshot::Receiver<()>,
) {
    let keeper = Keeper { members, key, ttl };
    let (mut lease, mut said) = (None, String::new());
    loop {
        let step = tokio::select! {
            _ = &mut withdrawn => break,
            step = keeper.step(&mut lease) => step,
        };
        let pause = match step {
            Ok(lease) => {
                said.clear();
                lease.ttl / 3
            }
            Err(CallError::Unusable(why)) => {
                // It will say so again and again; people want to know once.
                if why != said {
                    log::warn!("this process cannot be announced in {registry}: {why}");
                    said = why;
                }
                RETRY
            }
            Err(CallError::Unavailable(why) | CallError::Ambiguous(why)) => {
                log::debug!("this process is not announced in {registry} now: {why}");
                RETRY
            }
        };
        tokio::select! {
            _ = &mut withdrawn => break,
            () = sleep(pause.min(ttl)) => {}
        }
    }
    if let Some(lease) = lease {
        let question = LeaseRevokeRequest { id: lease.id };
        let members = &keeper.members;
        let asked = members.call::<_, LeaseRevokeResponse>(LEASE_REVOKE, &question, Kind::Read);
        // Not in time, or not at all: it ends by itself.
        let _ = timeout(REVOKE, asked).await;
    }
}

impl Keeper {
    /// Renews the lease, or gets one.
    ///
    /// All of it may be asked twice: a lease that nobody knows of ends by itself.
    async fn step(&self, lease: &mut Option<Lease>) -> Result<Lease, CallError> {
        if let Some(held) = *lease {
            let question = LeaseKeepAliveRequest { id: held.id };
            let members = &self.members;
            let asked =
                members.call::<_, LeaseKeepAliveResponse>(LEASE_KEEP_ALIVE, &question, Kind::Read);
            if asked.await?.ttl > 0 {
                return Ok(held);
            }
            *lease = None;
        }
        let question = LeaseGrantRequest {
            ttl: i64::try_from(self.ttl.as_secs().max(1)).unwrap_or(i64::MAX),
        };
        let members = &self.members;
        let granted: LeaseGrantResponse = members.call(LEASE_GRANT, &question, Kind::Read).await?;
        let held = Lease {
            id: granted.id,
            ttl: Duration::from_secs(u64::try_from(granted.ttl).unwrap_or(1).max(1)),
        };
        let put = Op::Put(PutRequest {
            key: [&self.key, format!("/{:x}", held.id).as_bytes()].concat(),
            value: Vec::new(),
            lease: held.id,
        });
        let question = TxnRequest {
            compare: Vec::new(),
            success: vec![operation(put)],
            failure: Vec::new(),
        };
        let _: TxnResponse = members.call(TXN, &question, Kind::Read).await?;
        *lease = Some(held);
        Ok(held)
    }
}
