-- RENEW: extends the leases of jobs that emit nothing at the moment (long prefill, waiting for memory).
--
-- ARGV: 1 lease in ms, then per job: id, fence
-- returns per job 1 ok | 0 lost: stop working on it
allow_at_maxmemory()
local t, out = now(), {}
for i = 2, #ARGV, 2 do
  local h = redis.call('HMGET', JOB .. ARGV[i], 'state', 'fence')
  if h[1] == 'running' and h[2] == ARGV[i + 1] then
    redis.call('ZADD', LEASE, t + tonumber(ARGV[1]), ARGV[i])
    out[#out + 1] = 1
  else
    out[#out + 1] = 0
  end
end
return out
