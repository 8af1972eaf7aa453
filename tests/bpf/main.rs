//! The kernel half and its loader, against a real kernel.

mod datapath_devices;
mod datapath_world;

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    let trials = datapath_devices::trials();
    libtest_mimic::run(&arguments, trials).exit();
}
