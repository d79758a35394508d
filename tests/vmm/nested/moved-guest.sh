#!/bin/busybox sh
# The first process of a guest that goes on in other machines while its programs run. Each line that begins with "guest:" or
# "count" is looked at by the test.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for pass in 1 2 3 4 5; do
    for module in /modules/*.ko; do
        insmod "$module" 2> /dev/null && rm "$module"
    done
done
until [ -b /dev/vda ]; do sleep 0.2; done
mount -t ext4 /dev/vda /mnt || { echo "guest: no root"; poweroff -f; }
: > /running
# Says a number, and what it takes the time for.
count() {
    n=0
    while [ -e /running ]; do
        n=$((n + 1))
        echo "count $n $(date +%s)"
        sleep 0.2
    done
    echo "$n" > /counted
}
# Writes to its disk, each line durable before the next.
write() {
    n=0
    while [ -e /running ]; do
        n=$((n + 1))
        echo "$n" >> /mnt/lines
        sync -d /mnt/lines
        dd if=/dev/urandom of=/mnt/random bs=64k count=1 conv=fsync 2> /dev/null
    done
    echo "$n" > /written
}
# Computes one and the same with the floating point unit, on one processor.
compute() {
    while [ -e /running ]; do
        taskset -c "$1" awk 'BEGIN { for (i = 1; i < 300000; i++) s += 1 / (i * i); printf "%.12f\n", s }' >> /sums
    done
}
count &
write &
compute 0 &
compute 1 &
# What the kernel says before is not about the moves.
dmesg -c > /dev/null
echo "guest: begun"
read line
echo "guest: heard $line"
rm /running
until [ -e /counted ] && [ -e /written ]; do sleep 0.2; done
wait
echo "guest: counted $(cat /counted)"
seq "$(cat /written)" | cmp - /mnt/lines && echo "guest: every line is there"
echo "guest: kinds of sums $(sort -u /sums | wc -l)"
for cpu in 0 1; do taskset -c $cpu echo "guest: processor $cpu lives"; done
sleep 1 && echo "guest: slept"
dd if=/dev/hwrng bs=512 count=1 2> /dev/null | wc -c | sed 's/^/guest: random /'
echo "guest: clock source $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "guest: told that it is another $(dmesg | grep -c 'virtual machine fork') times"
dmesg | grep -iE 'lockup|stall|unstable|BUG:|WARNING|hung task|I/O error|EXT4-fs (error|warning)|time jump' |
    sed 's/^/guest: complains /'
umount /mnt && echo "guest: off"
poweroff -f
