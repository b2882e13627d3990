//! Connections from other nodes until they are somebody's: accepted, greeted, admitted or refused, and handed to the worker
//! that owns the volume.

use std::io;

use log::Level;
use mio::Interest;
use mio::net::TcpListener;

use super::{DOOR, Loop, owner};
use crate::engine::channel::Channel;
use crate::engine::command::Command;
use crate::engine::conn::{Conn, Moved};
use crate::engine::context::{Peer, Role};
use crate::replication::ids::CopyId;
use crate::replication::replica::REQUESTS_MAX;
use crate::wire::hello::{Answer, Hello, HelloAck, HelloRefusal, Reason, VERSIONS};

/// Connections that have not greeted yet: peers greet at once, and each holds a buffer (S19).
const STRANGERS: usize = 256;

impl Loop {
    pub(super) fn listen(&mut self, listener: std::net::TcpListener) {
        let mut listener = match listener.set_nonblocking(true) {
            Ok(()) => TcpListener::from_std(listener),
            Err(e) => return log::error!("the replication socket cannot be used: {e}"),
        };
        if let Err(e) = self
            .poll
            .registry()
            .register(&mut listener, DOOR, Interest::READABLE)
        {
            log::error!("the replication socket cannot be watched: {e}");
        }
        self.listener = Some(listener);
        self.accept();
    }

    pub(super) fn accept(&mut self) {
        loop {
            let Some(listener) = &self.listener else {
                return;
            };
            match listener.accept() {
                Ok((stream, from)) => {
                    let strangers = |p: &&Peer| matches!(p.role, Role::Stranger);
                    if self.ctx.peers.values().filter(strangers).count() >= STRANGERS {
                        log::warn!(
                            "a connection from {from} was dropped: {STRANGERS} others have not greeted"
                        );
                        continue;
                    }
                    let _ = stream.set_nodelay(true);
                    let channel = Channel::accepted(self.ctx.security.server());
                    if let Err(e) = self.ctx.add(Conn::new(stream, channel), Role::Stranger) {
                        log::warn!("a connection cannot be watched: {e}");
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // No descriptor left, for instance: tried again at each tick, because what waits is
                // not announced twice.
                Err(e) => {
                    log::warn!("accepting a connection failed: {e}");
                    self.door_waits = true;
                    return;
                }
            }
        }
    }

    /// A greeting: answered here, or by the worker that owns the volume.
    pub(super) fn welcome(&mut self, token: usize, hello: Hello) {
        let proof = self.ctx.peers.get(&token).and_then(|p| p.conn.proof());
        if let Err(text) = self.ctx.security.admit(proof, &hello.node) {
            // Whoever only asks who is here has had the answer.
            let asks = hello.copy == CopyId([0; 16]);
            let level = if asks { Level::Debug } else { Level::Warn };
            log::log!(level, "node {} was refused: {text}", hello.node);
            return self.refuse(token, HelloRefusal::new(Reason::Unproven, text));
        }
        let me = &self.setup.me;
        if hello.cluster != me.cluster {
            let text = format!(
                "node {} is of cluster {}, you are of {}",
                me.node, me.cluster, hello.cluster
            );
            log::warn!("node {} was refused: {text}", hello.node);
            return self.refuse(token, HelloRefusal::new(Reason::WrongCluster, text));
        }
        let owner = owner(hello.volume, self.setup.workers);
        if owner == self.setup.index {
            return self.admit(token, &hello);
        }
        let Some(peer) = self.ctx.remove(token) else {
            return;
        };
        if let Some(sibling) = self.siblings.get(owner) {
            let moved = Box::new(peer.conn.leave());
            sibling.send(Command::Adopt(moved, Box::new(hello)));
        }
    }

    pub(super) fn refuse(&mut self, token: usize, refusal: HelloRefusal) {
        let mut bytes = Vec::new();
        Answer::Refusal(refusal.by(&self.setup.me.node)).encode(&mut bytes);
        self.ctx.push(token, bytes);
        if let Some(peer) = self.ctx.peers.get_mut(&token) {
            peer.role = Role::Closing;
        }
    }

    fn admit(&mut self, token: usize, hello: &Hello) {
        let at = self.by_id.get(&hello.volume).copied();
        let known = at.filter(|at| self.volumes[*at].copy_id() == Some(hello.copy));
        let Some(at) = known else {
            let text = format!(
                "node {} has no copy {} of volume {}",
                self.setup.me.node, hello.copy, hello.volume
            );
            return self.refuse(token, HelloRefusal::new(Reason::UnknownCopy, text));
        };
        let me = &self.setup.me;
        let ack = HelloAck {
            version: VERSIONS.max.min(hello.versions.max),
            features: 0,
            cluster: me.cluster,
            node: me.node.clone(),
            boot_id: me.boot_id,
            instance: me.instance,
            credits: REQUESTS_MAX as u32 / 2,
        };
        let mut bytes = Vec::new();
        Answer::Ack(ack).encode(&mut bytes);
        self.ctx.push(token, bytes);
        let session = self.ctx.session();
        self.ctx.sessions.insert(session, token);
        if let Some(peer) = self.ctx.peers.get_mut(&token) {
            peer.role = Role::Attachment {
                volume: at,
                session,
                acks: Vec::new(),
            };
        }
    }

    pub(super) fn adopt(&mut self, moved: Moved, hello: &Hello) {
        match self.ctx.add(moved.arrive(), Role::Stranger) {
            Ok(token) => {
                self.admit(token, hello);
                if let Err(why) = self.understand(token) {
                    self.end(token, &why);
                }
                self.readable.push(token);
            }
            Err(e) => log::warn!("a connection cannot be watched: {e}"),
        }
    }
}
