//! HTTP as its clients see it: what the port refuses, what Prometheus reads, what bad requests get.

mod mgmt_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use hyper::Method;
use lockstep::api::client::Target;
use mgmt_support::{Lab, Node, raw, request};
use serde_json::json;

fn http(node: &Node) -> Target {
    Target::Tcp(node.http.clone())
}

fn text(node: &Node, path: &str) -> String {
    let answer = raw(&http(node), Method::GET, path, None);
    assert_eq!(answer.status.as_u16(), 200, "{path}");
    String::from_utf8(answer.body.to_vec()).unwrap()
}

#[test]
fn the_port_reads_and_changes_nothing() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    n1.create("vm1", 0);
    let body = json!({"namespace": "default", "name": "vm2", "size": 1 << 30});
    for (method, path) in [
        (Method::POST, "/api/v1/volumes"),
        (Method::DELETE, "/api/v1/volumes/default/vm1"),
        (Method::PATCH, "/api/v1/volumes/default/vm1"),
    ] {
        let (status, fault) = request(&http(&n1), method, path, Some(body.clone()));
        assert_eq!(status, 405, "{path}: {fault}");
        assert!(fault["hint"].as_str().unwrap().contains("api.sock"));
    }
    let (status, _) = request(
        &http(&n1),
        Method::POST,
        "/api/v1/volumes/default/vm1/attach",
        Some(json!({})),
    );
    assert_eq!(status, 404);
    let (_, volumes) = request(&http(&n1), Method::GET, "/api/v1/volumes", None);
    assert_eq!(volumes.as_array().unwrap().len(), 1);
    let mode = std::fs::metadata(n1.run_dir.join("api.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o660);
}

#[test]
fn health_identity_and_the_page_are_served() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    n1.create("vm1", 0);
    let (status, health) = request(&http(&n1), Method::GET, "/healthz", None);
    assert_eq!((status, health["status"].as_str()), (200, Some("ok")));
    assert_eq!(health["node"], "n1");
    let page = text(&n1, "/");
    assert!(
        page.contains("default/vm1") && page.contains("healthy"),
        "{page}"
    );
}

#[test]
fn metrics_have_the_names_of_the_interface() {
    let lab = Lab::new();
    let [n1, n2]: [Node; 2] = lab.nodes();
    n1.create("vm1", 1);
    let (status, _) = n1.post("/api/v1/volumes/default/vm1/attach", json!({}));
    assert_eq!(status, 200);
    // They come from what the control loop knows, which may be a moment old.
    let epoch = "lockstep_volume_epoch{namespace=\"default\",volume=\"vm1\"} 2\n";
    let metrics = mgmt_support::eventually("the control loop knows the attachment's epoch", || {
        Some(text(&n1, "/metrics")).filter(|metrics| metrics.contains(epoch))
    });
    for line in [
        "lockstep_volume_frontend_write_total{namespace=\"default\",volume=\"vm1\"} 7",
        "lockstep_volume_frontend_write_seconds_count{namespace=\"default\",volume=\"vm1\"} 1",
        "lockstep_volume_backend_flush_errors_total{namespace=\"default\",volume=\"vm1\"} 0",
        "lockstep_volume_network_discard_bytes_total{namespace=\"default\",volume=\"vm1\"} 0",
        "lockstep_volume_health{namespace=\"default\",volume=\"vm1\",state=\"healthy\"} 1",
        "lockstep_volume_health{namespace=\"default\",volume=\"vm1\",state=\"offline\"} 0",
        "lockstep_volume_replicas_wanted{namespace=\"default\",volume=\"vm1\"} 1",
        "lockstep_volume_replicas_in_sync{namespace=\"default\",volume=\"vm1\"} 1",
        "lockstep_volume_size_bytes{namespace=\"default\",volume=\"vm1\"} 1073741824",
        "lockstep_volume_allocated_bytes{namespace=\"default\",volume=\"vm1\"} 4096",
        "lockstep_volume_sync_remaining_bytes{namespace=\"default\",volume=\"vm1\"} 0",
        "lockstep_volume_epoch{namespace=\"default\",volume=\"vm1\"} 2",
        "lockstep_volume_inflight_requests{namespace=\"default\",volume=\"vm1\"} 2",
        "lockstep_wire_raw_bytes_total 0",
        "lockstep_wire_compressed_bytes_total 0",
        "lockstep_promotions_total 0",
        "lockstep_ejections_total{reason=\"late\"} 3",
        "lockstep_syncs_total{result=\"started\"} 2",
        "lockstep_syncs_total{result=\"completed\"} 1",
        "lockstep_failover_seconds_count 0",
        "lockstep_node_capacity_bytes{node=\"n1\"} 107374182400",
        "lockstep_node_free_bytes{node=\"n1\"} 53687091200",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} in\n{metrics}");
    }
    for name in [
        "lockstep_registry_seconds_bucket{op=\"read\"",
        "process_resident_memory_bytes ",
        "process_cpu_seconds_total ",
    ] {
        assert!(metrics.lines().any(|l| l.starts_with(name)), "{name}");
    }
    mgmt_support::eventually("n1 says that it reaches n2", || {
        let line = "lockstep_node_reaches{node=\"n2\"} 1";
        text(&n1, "/metrics")
            .lines()
            .any(|l| l == line)
            .then_some(())
    });
    // A volume's own gauges come from one node.
    let other = text(&n2, "/metrics");
    assert!(!other.contains("lockstep_volume_health{"), "{other}");
    assert!(other.contains("lockstep_volume_allocated_bytes{"));
}

#[test]
fn bad_requests_get_a_fault_and_the_node_lives() {
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    for (method, path, body, status) in [
        (Method::GET, "/api/v1/nothing", None, 404),
        (Method::GET, "/api/v1/volumes/default/absent", None, 404),
        (Method::GET, "/api/v1/volumes/-bad/name", None, 400),
        (Method::GET, "/api/v1/volumes/%2e%2e/name", None, 400),
        (Method::GET, "/api/v1/volumes?selector=a%20b", None, 400),
        (Method::GET, "/api/v1/events?volume=..", None, 400),
        (Method::POST, "/api/v1/volumes", Some(json!([1])), 400),
        (
            Method::POST,
            "/api/v1/volumes",
            Some(json!({"name": "x"})),
            400,
        ),
        (
            Method::POST,
            "/api/v1/volumes",
            Some(json!({"namespace": "d", "name": "x", "size": 0})),
            400,
        ),
        (
            Method::POST,
            "/api/v1/volumes",
            Some(json!({"namespace": "d", "name": "x", "size": u64::MAX - 511})),
            400,
        ),
    ] {
        let (got, fault) = n1.ask(method, path, body);
        assert_eq!(got, status, "{path}: {fault}");
        assert!(!fault["message"].as_str().unwrap().is_empty());
    }
    // Not HTTP at all, half a request, and many idle connections.
    for bytes in [
        &b"\x00\xff\xfe garbage\r\n\r\n"[..],
        b"GET / HTTP/1.1\r\nHos",
        b"",
    ] {
        let mut stream = TcpStream::connect(&n1.http).unwrap();
        stream.write_all(bytes).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let _ = stream.read(&mut [0; 64]);
    }
    let idle: Vec<TcpStream> = (0..50)
        .map(|_| TcpStream::connect(&n1.http).unwrap())
        .collect();
    assert_eq!(request(&http(&n1), Method::GET, "/healthz", None).0, 200);
    drop(idle);
}

#[test]
fn waiting_commands_do_not_delay_the_answers_between_nodes() {
    use lockstep::cluster::host::HostError;
    let lab = Lab::new();
    let [n1]: [Node; 1] = lab.nodes();
    n1.create("vm1", 0);
    n1.host.levers.lock().unwrap().attach_error = Some(HostError::Busy("not yet".into()));
    thread::scope(|s| {
        let waiting: Vec<_> = (0..20)
            .map(|_| s.spawn(|| n1.post("/api/v1/volumes/default/vm1/attach", json!({})).0))
            .collect();
        let (status, _) = request(&http(&n1), Method::GET, "/api/v1/local/status", None);
        assert_eq!(status, 200);
        n1.host.levers.lock().unwrap().attach_error = None;
        for w in waiting {
            assert_eq!(w.join().unwrap(), 200);
        }
    });
}
