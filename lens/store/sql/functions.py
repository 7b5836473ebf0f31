"""The functions that a user's SELECT may call: an allow-list, since every new engine brings new ones.

Left out on purpose: whatever reads or writes outside the query (file, dictGet, joinGet, url …), tells about the
server (hostName, getSetting, version …), sleeps, or makes much out of little (repeat, range, arrayWithConstant …),
which no time limit would stop in time.
"""

from __future__ import annotations

from collections.abc import Iterable


def words_of(text: str) -> list[str]:
    """The words of a text, for long lists of names."""
    return text.split()


_AGGREGATES = words_of("""
any anyHeavy anyLast argMax argMin avg avgWeighted corr count covarPop covarSamp deltaSum deltaSumTimestamp
entropy exponentialMovingAverage exponentialTimeDecayedAvg first_value groupArray groupArrayLast
groupArraySample groupArraySorted groupBitAnd groupBitOr groupBitXor groupUniqArray histogram
kolmogorovSmirnovTest kurtPop kurtSamp largestTriangleThreeBuckets last_value lttb mannWhitneyUTest max maxMap
median medianExact min minMap nonNegativeDerivative quantile quantileDD quantileDeterministic quantileExact
quantileExactHigh quantileExactLow quantileExactWeighted quantileInterpolatedWeighted quantileTDigest
quantileTDigestWeighted quantileTiming quantiles quantilesDD quantilesExact quantilesTDigest rankCorr
simpleLinearRegression singleValueOrNull skewPop skewSamp stddevPop stddevSamp studentTTest sum sumCount
sumKahan sumMap topK topKWeighted uniq uniqCombined uniqCombined64 uniqExact uniqHLL12 varPop varSamp welchTTest
""")

_WINDOWS = words_of("""
cume_dist dense_rank denseRank first_value lag lagInFrame last_value lead leadInFrame nth_value ntile
percent_rank percentRank rank row_number
""")

_PLAIN = words_of("""
abs divide divideOrNull gcd ifNotFinite intDiv intDivOrNull intDivOrZero isFinite isInfinite isNaN lcm max2 min2
minus modulo moduloOrZero multiply negate plus positiveModulo array arrayAll arrayAvg arrayCompact arrayConcat
arrayCount arrayCumSum arrayDifference arrayDistinct arrayElement arrayElementOrNull arrayEnumerate
arrayEnumerateDense arrayEnumerateUniq arrayExists arrayFilter arrayFirst arrayFirstIndex arrayFlatten
arrayIntersect arrayJoin arrayLast arrayLastIndex arrayMap arrayMax arrayMin arrayPartialSort arrayProduct
arrayPopBack arrayPopFront arrayReverse arrayReverseSort arraySlice arraySort arrayStringConcat arraySum
arrayUniq arrayZip countEqual empty has hasAll hasAny indexOf length notEmpty reverse bitAnd bitCount bitNot
bitOr bitShiftLeft bitShiftRight bitTest bitXor equals globalIn globalNotIn greater greaterOrEquals in
isDistinctFrom isNotDistinctFrom less lessOrEquals notEquals notIn clamp greatest if least multiIf and not or
xor exists lambda addDays addHours addInterval addMinutes addMonths addNanoseconds addSeconds addWeeks age
dateDiff dateName dateTrunc date_diff date_trunc formatDateTime fromUnixTimestamp fromUnixTimestamp64Micro
fromUnixTimestamp64Milli fromUnixTimestamp64Nano now now64 subtractDays subtractHours subtractInterval
subtractMinutes subtractSeconds subtractWeeks timeSlot toDate toDateTime toDateTime64 toDayOfMonth toDayOfWeek
toDayOfYear toHour toIntervalDay toIntervalHour toIntervalMillisecond toIntervalMinute toIntervalNanosecond
toIntervalSecond toIntervalWeek toMinute toMonday toMonth toSecond toStartOfDay toStartOfFifteenMinutes
toStartOfFiveMinutes toStartOfHour toStartOfInterval toStartOfMinute toStartOfMonth toStartOfSecond
toStartOfTenMinutes toStartOfWeek toTimezone toUnixTimestamp toUnixTimestamp64Micro toUnixTimestamp64Milli
toUnixTimestamp64Nano toYYYYMM toYYYYMMDD toYear today yesterday L1Distance L1Norm L2Distance L2Norm
LinfDistance LinfNorm cosineDistance dotProduct bin hex cityHash64 sipHash64 xxHash64 JSONExtract
JSONExtractArrayRaw JSONExtractBool JSONExtractFloat JSONExtractInt JSONExtractKeys JSONExtractKeysAndValues
JSONExtractRaw JSONExtractString JSONExtractUInt JSONHas JSONLength JSONType isValidJSON toJSONString map
mapContains mapContainsKey mapExists mapFilter mapFromArrays mapKeys mapSort mapValues acos acosh asin asinh
atan atan2 atanh cbrt ceil ceiling cos cosh degrees e erf erfc exp exp10 exp2 floor hypot lgamma ln log log10
log1p log2 pi pow power radians round roundBankers roundDown roundToExp2 sigmoid sign sin sinh sqrt tan tanh
tgamma trunc truncate widthBucket assumeNotNull coalesce ifNull isNotNull isNull isNullable nullIf toNullable
bar formatReadableQuantity formatReadableSize formatReadableTimeDelta identity materialize parseTimeDelta
rowNumberInAllBlocks runningDifference toTypeName transform base64Encode concat concatWithSeparator endsWith
left lengthUTF8 lower lowerUTF8 naturalSortKey right startsWith substr substring substringIndex substringUTF8
toValidUTF8 trimBoth trimLeft trimRight upper upperUTF8 format replace replaceAll replaceOne replaceRegexpAll
replaceRegexpOne translate countMatches countSubstrings extract extractAll extractAllGroups extractGroups ilike
like locate match multiSearchAny ngramDistance notILike notLike position positionCaseInsensitive splitByChar
splitByNonAlpha splitByRegexp splitByString tuple tupleElement tupleMinus tuplePlus untuple CAST accurateCast
accurateCastOrNull caseWithExpression parseDateTime parseDateTimeBestEffort parseDateTimeBestEffortOrNull
reinterpretAsFloat64 reinterpretAsInt64 toBool toDecimal64 toFloat32 toFloat64 toFloat64OrNull toFloat64OrZero
toInt16 toInt32 toInt32OrNull toInt64 toInt64OrNull toInt64OrZero toInt8 toLowCardinality toString toUInt16
toUInt32 toUInt32OrNull toUInt64 toUInt64OrNull toUInt64OrZero toUInt8 grouping
""")

_COMBINATORS = ("if", "distinct", "ornull", "ordefault", "array")
_NAMES = frozenset(name.lower() for name in (*_AGGREGATES, *_WINDOWS, *_PLAIN))
_AGGREGATE_NAMES = frozenset(name.lower() for name in _AGGREGATES)
TYPED = frozenset({"cast", "accuratecast", "accuratecastornull", "jsonextract"})
"""Functions whose last argument names a type."""
IN_FUNCTIONS = frozenset({"in", "notin", "globalin", "globalnotin"})
"""Functions whose right side may name a table."""


def is_allowed(name: str) -> bool:
    """Whether a SELECT may call this function: by its own name or, of an aggregate, with `If`, `Distinct` and such.

    The engine ignores the case of some names; no two functions differ by case alone.
    """
    lowered = name.lower()
    if lowered in _NAMES:
        return True
    for combinator in _COMBINATORS:
        if lowered.endswith(combinator) and lowered != combinator:
            rest = lowered.removesuffix(combinator)
            return rest in _AGGREGATE_NAMES or (any(rest.endswith(c) for c in _COMBINATORS) and is_allowed(rest))
    return False


def forbidden_names(functions: Iterable[str], columns: Iterable[str]) -> frozenset[str]:
    """Names, in lower case, that a SELECT may not use even bare: functions that may not be called, but the views' own
    columns (none of which is the name of a function that reads or writes)."""
    return frozenset(name.lower() for name in functions if not is_allowed(name)) - {c.lower() for c in columns}
