-- BATCH_PUT: a batch as it is now comes into the indexes. One that is behind what stands there changes nothing: who drives
-- a batch without knowing that it was cancelled, or that somebody else ended it, must not take that back. Stands alone,
-- without the prelude.
--
-- KEYS: 1 the batch, 2 batches of the tenant, 3 all batches, 4 open batches, 5 open batches of the tenant, 6 ticks
-- ARGV: 1 id, 2 rank, 3 JSON, 4 '1' if it is open
-- returns 1 written | 0 it is behind
redis.call('ZREM', KEYS[4], '')   -- so that it works at maxmemory, as in prelude.lua: what was accepted can be finished
local old = redis.call('HGET', KEYS[1], 'rank')
if old and tonumber(old) > tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'rank', ARGV[2], 'json', ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('ZADD', KEYS[3], 0, ARGV[1])
if ARGV[4] == '1' then
  redis.call('ZADD', KEYS[4], ARGV[2], ARGV[1])
  redis.call('SADD', KEYS[5], ARGV[1])
else
  redis.call('ZREM', KEYS[4], ARGV[1])
  redis.call('SREM', KEYS[5], ARGV[1])
  redis.call('HDEL', KEYS[6], ARGV[1])
end
return 1
