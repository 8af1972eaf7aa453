//! Pods are found: those that start, by the CNI plugin, before their first container runs; those
//! that run already, by looking through /proc.
//!
//! ```text
//! kubelet ─► containerd ─► bridge, flannel, calico … ─► picomesh-cni ── the pod's netns ──► agent
//!                                                            ◄── captured, not meshed, or why not
//! ```
//!
//! Two processes share the room. The plugin's side is [`plugin`]: it is compiled without the
//! feature `agent`, with next to no dependencies, because its program runs on the node's own
//! system, once per pod. What both sides read is [`message`], what one says to the other over
//! [`SOCKET`] in the agent's run directory, and [`intent`], what the plugin goes by while no agent
//! answers. The agent's side: [`server`] answers, [`sandboxes`] remembers where each pod's network
//! namespace is, [`running`] finds those of pods that are older than the agent, [`keeping`] writes
//! the file of [`intent`], and [`install`] puts the plugin into the node's CNI configuration and
//! takes it out again.
//!
//! The room knows nothing of the mesh or the kernel half: `app` tells it which pods are meshed and
//! captured, behind [`server::Pods`].

pub mod intent;
pub mod message;
pub mod plugin;

#[cfg(feature = "agent")]
pub mod install;
#[cfg(feature = "agent")]
pub mod keeping;
#[cfg(feature = "agent")]
pub mod running;
#[cfg(feature = "agent")]
pub mod sandboxes;
#[cfg(feature = "agent")]
pub mod server;

/// The plugin's program, and the `type` of its entry in a network configuration.
pub const PLUGIN: &str = "picomesh-cni";
/// The socket's name in the run directory.
pub const SOCKET: &str = "cni.sock";
/// What the plugin goes by while no agent answers.
pub const INTENT: &str = "/var/lib/picomesh/cni.json";

/// To so many bytes, where a character ends.
fn shortened(mut text: String, longest: usize) -> String {
    let mut end = text.len().min(longest);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
