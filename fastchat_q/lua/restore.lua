-- RESTORE: a failover rolled the log back, and a client has tokens that are gone. They are put back, and who writes at the
-- moment is fenced out: the next worker goes on behind what the client has. Where the log has other tokens by now they
-- cannot be put back: then the record says that ids of events are void, and nobody goes on behind one (field `void`).
--
-- ARGV: 1 id, 2 tokens in the log, as the caller read it, 3.. the entries that are put back: n, tokens, payload; without
--       any the ids are void, be the job running or ended
-- returns 1 ok | 0 the job has ended, or is gone | 3 the log has changed meanwhile, read it again
allow_at_maxmemory()
if #ARGV == 2 then
  if redis.call('EXISTS', JOB .. ARGV[1]) == 0 then return 0 end
  redis.call('HSET', JOB .. ARGV[1], 'void', '1')
  return 1
end
local id, have, n = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[#ARGV - 2])
local h = redis.call('HMGET', JOB .. id, 'state', 'n', 'deadline_ms')
if h[1] ~= 'queued' and h[1] ~= 'running' then return 0 end
if tonumber(h[2]) ~= have then return 3 end
append_to_log(id, 3, h[3])
redis.call('HSET', JOB .. id, 'n', n)
if h[1] == 'running' then hand_back(id, 'log rolled back') end
return 1
