//! The tier `bpf`: the kernel half and the datapath on real namespaces.

mod datapath;

use libtest_mimic::Arguments;

fn main() {
    let arguments = Arguments::from_args();
    let missing = (!nix::unistd::geteuid().is_root()).then_some("needs root");
    libtest_mimic::run(&arguments, datapath::trials(missing)).exit();
}
