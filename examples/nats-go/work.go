package main

import (
	"encoding/json"
	"errors"
	"os"
	"strconv"
	"syscall"
	"time"
)

type job struct {
	ID   string `json:"id"`
	What string `json:"what"`
}

// work does one job, and returns its id and a line about it. Put your own in its place.
// An error makes it a try in vain.
func work(data []byte) (id, result string, err error) {
	var job job
	if err := json.Unmarshal(data, &job); err != nil {
		return "", "", err
	}
	switch job.What {
	case "kill":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "fail":
		return "", "", errors.New("told to fail")
	}
	seconds, err := strconv.ParseFloat(job.What, 64)
	if err != nil {
		return "", "", err
	}
	time.Sleep(time.Duration(seconds * float64(time.Second)))
	return job.ID, job.ID + " done", nil
}
