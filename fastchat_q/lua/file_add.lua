-- FILE_ADD: a file whose bytes and record are in the storage comes into the indexes. Again for the same id: its record is
-- replaced, and counted once. Stands alone, without the prelude.
--
-- KEYS: 1 the record, 2 files of the tenant, 3 all files, 4 expiry, 5 bytes
-- ARGV: 1 id, 2 record as JSON, 3 tenant, 4 bytes, 5 expiry in unix seconds or '', 6 bytes that the tenant may have, or 0
-- returns {1 added | 0 it would be too much: nothing was done, bytes of the tenant's files}
local size, limit = tonumber(ARGV[4]), tonumber(ARGV[6])
local old = redis.call('GET', KEYS[1])
if old then size = size - cjson.decode(old).bytes end
local used = tonumber(redis.call('HGET', KEYS[5], ARGV[3]) or 0)
if limit > 0 and used + size > limit then return {0, used} end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('ZADD', KEYS[3], 0, ARGV[1])
if ARGV[5] ~= '' then
  redis.call('ZADD', KEYS[4], ARGV[5], ARGV[1])
else
  redis.call('ZREM', KEYS[4], ARGV[1])
end
return {1, redis.call('HINCRBY', KEYS[5], ARGV[3], size)}
