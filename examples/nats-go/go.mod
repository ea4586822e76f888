module jobs

go 1.21

require github.com/nats-io/nats.go v1.22.1
