#!/bin/busybox sh
# The first process of a test guest, from the initrd: loads the drivers, mounts the disk and goes over to it.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

# What a module needs goes in before it, and which that is differs from kernel to kernel: so in several passes.
for pass in 1 2 3 4 5; do
    for module in /modules/*.ko; do
        insmod "$module" 2> /dev/null && rm "$module"
    done
done

tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || { echo "guest: no /dev/vda; left to load: $(ls /modules)"; poweroff -f; }
    sleep 0.1
done
mount -t ext4 /dev/vda /root || { echo "guest: /dev/vda cannot be mounted"; poweroff -f; }
for dir in dev proc sys; do
    mount --move /$dir /root/$dir
done
exec switch_root /root /agent
