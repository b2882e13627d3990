//! `/`: volumes and nodes on one plain page.

use crate::cluster::units::show_size;
use crate::cluster::view::{NodeView, VolumeView};

const STYLE: &str = "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}\
    td,th{text-align:left;padding:.3em 1em .3em 0;border-bottom:1px solid #ddd}\
    .healthy,.online{color:#080}.syncing,.degraded,.unreachable{color:#a60}.suspended,.offline{color:#c00}";

/// The page.
pub(super) fn page(volumes: &[VolumeView], nodes: &[NodeView]) -> String {
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"refresh\" content=\"5\"><title>lockstep</title><style>{STYLE}</style></head>\
         <body><h1>lockstep</h1>"
    );
    html += "<h2>Volumes</h2><table><tr><th>Volume<th>Size<th>Attached<th>Health<th>Replicas<th>Master<th>Why</tr>";
    for v in volumes {
        let attached = v.attachment.as_ref().map_or("-", |a| &a.node.0);
        html += &format!(
            "<tr><td>{}/{}<td>{}<td>{}<td class=\"{}\">{}<td>{}/{}<td>{}<td>{}</tr>",
            escape(&v.namespace),
            escape(&v.name),
            show_size(v.size),
            escape(attached),
            v.health.word(),
            v.health.word(),
            v.replicas_in_sync,
            v.replicas,
            escape(&v.master.node.0),
            escape(&v.why),
        );
    }
    html += "</table><h2>Nodes</h2><table><tr><th>Node<th>Address<th>Health<th>Capacity<th>Free<th>Version</tr>";
    for n in nodes {
        html += &format!(
            "<tr><td>{}<td>{}<td class=\"{}\">{}<td>{}<td>{}<td>{}</tr>",
            escape(&n.name.0),
            escape(&n.address),
            escape(&n.health),
            escape(&n.health),
            show_size(n.capacity.total),
            show_size(n.capacity.free),
            escape(&n.version),
        );
    }
    html + "</table></body></html>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
